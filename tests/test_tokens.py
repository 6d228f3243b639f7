import json

import pytest
import torch
from tiny import problems, tiny_champion, tiny_lm, tiny_quiet_star
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import qs_lib as qs
from qs_lib.champion import build_champion, build_tokenizer, load_tokenizer
from qs_lib.data.tokens import (
    PLAIN_WORDS,
    encode,
    encode_context,
    encode_reply,
    length_batches,
    line_ends,
    mark,
    marker_spellings,
    padded,
    thinking_ids,
)
from qs_lib.evaluation.accuracy import answer_of


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_old_logits_are_unchanged_and_adding_again_changes_nothing(architecture):
    model, tokenizer = tiny_champion(architecture)
    ids = torch.tensor([tokenizer.encode("ben has 9 pens . how many pens has ben ?")])
    before, size = model(ids).logits, len(tokenizer)
    qs.add_thinking_tokens(model, tokenizer)
    assert torch.equal(model(ids).logits[..., :size], before)
    assert len(tokenizer) == size + 8 and thinking_ids(tokenizer) == list(range(size, size + 8))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    qs.add_thinking_tokens(model, tokenizer)
    assert len(tokenizer) == size + 8 and all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_new_rows_are_as_far_from_the_mean_row_as_real_ones():
    model, tokenizer = tiny_lm()
    weight = model.get_input_embeddings().weight
    old = weight[: len(tokenizer) - 8]
    far = (weight - old.mean(0)).norm(dim=1)
    median = far[: len(tokenizer) - 8].median()
    assert torch.allclose(far[thinking_ids(tokenizer)], median.expand(8), rtol=1e-4)


def test_new_tokens_take_nothing_from_the_predictions_of_rows_with_a_common_part():
    """As in a pretrained model: scaled from zero, the rows would point along the common part and win everywhere."""
    model, tokenizer = tiny_champion()
    with torch.no_grad():
        common = torch.randn(32, generator=torch.Generator().manual_seed(0))
        model.get_input_embeddings().weight.add_(0.5 * common)
        qs.add_thinking_tokens(model, tokenizer)
        shares = model.lm_head(common).softmax(-1)  # after a state along the common part all logits are high
    assert shares[thinking_ids(tokenizer)].sum() < 16 / len(tokenizer)


def test_untied_head_and_padded_matrix_never_shrink():
    tokenizer = build_tokenizer("bpe", ["how many eggs has tom ? think step done parts"] * 5, vocab_size=300)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer) + 64, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    )
    qs.add_thinking_tokens(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) + 56
    rows = thinking_ids(tokenizer)
    assert not torch.equal(model.lm_head.weight[rows], model.get_input_embeddings().weight[rows])


def test_round_trip_through_save_and_load(tmp_path):
    model, tokenizer = tiny_lm()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert thinking_ids(words) == thinking_ids(tokenizer)
    assert again.config.think_token_id == thinking_ids(tokenizer)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["pocket", "bpe"])
def test_marked_and_plain_replies_are_aligned(kind):
    text = "think parts 9 8 step 9 + 8 = 17 done 17 ."
    learned = [f" {w} has" for w in PLAIN_WORDS.values()] * 3 + [f"ben {text}"]
    tokenizer = build_tokenizer(kind, learned if kind == "bpe" else [], vocab_size=330)
    tokenizer.add_tokens(list(qs.THINKING_TOKENS), special_tokens=True)
    plain = tokenizer.encode(" " + text, add_special_tokens=False)
    marked, last = mark(plain, marker_spellings(tokenizer))
    tags = [t for t in marked if t in thinking_ids(tokenizer)]
    assert tokenizer.convert_ids_to_tokens(tags) == ["<think>", "<mece>", "<step>", "</think>"]
    assert last[-1] == len(plain) - 1 and sorted(last) == last and len(last) == len(marked)
    rebuilt = [
        " " + PLAIN_WORDS[tokenizer.decode([i])] if i in thinking_ids(tokenizer) else tokenizer.decode([i])
        for i in marked
    ]
    assert "".join("".join(rebuilt).split()) == "".join(text.split())


def test_reply_ids_do_not_depend_on_the_context():
    _, tokenizer = tiny_lm()
    one, two = encode(tokenizer, "ben has 9 pens", "9 ."), encode(tokenizer, "how many ?", "9 .")
    assert one.ids[one.start :] == two.ids[two.start :] and one.ids[-1] == tokenizer.eos_token_id


def test_ids_and_mask_are_padded_together():
    _, tokenizer = tiny_champion()
    fill = tokenizer.pad_token_id
    ids, mask = padded(tokenizer, [[7, fill, 9], [8]])
    assert ids.tolist() == [[7, fill, 9], [8, fill, fill]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = padded(tokenizer, [[7, fill, 9], [8]], side="left")
    assert ids.tolist() == [[7, fill, 9], [fill, fill, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_length_batches_cover_everything_once():
    import random

    batches = length_batches([random.Random(0).randint(1, 50) for _ in range(103)], 8, random.Random(0))
    assert sorted(i for b in batches for i in b) == list(range(103)) and max(map(len, batches)) == 8


def test_a_tokenizer_is_loaded_as_it_was_saved(tmp_path):
    """Beside a Qwen2 model AutoTokenizer would put Qwen2's tokenizer in place of a plain one."""
    tokenizer = build_tokenizer("bpe", ["ben has 17 pens and 230 cups ? think step done parts"] * 5, vocab_size=330)
    model = build_champion(tokenizer, "qwen2", 32, 2, 2, 48)
    model, tokenizer = qs.add_thinking_tokens(model, tokenizer)
    text = "ben has 17 pens <think> 230 </think>"
    for round_trip in range(2):
        model.save_pretrained(tmp_path / str(round_trip))
        tokenizer.save_pretrained(tmp_path / str(round_trip))
        model, again = qs.load_champion(str(tmp_path / str(round_trip)))
        assert len(again) == len(tokenizer) and again.tokenize(text) == tokenizer.tokenize(text)
        tokenizer = again
    assert "\u01201" in tokenizer.tokenize(text) and "7" in tokenizer.tokenize(text), "a digit is a token"


def word_level(vocabulary, **special):
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **({"eos_token": "<eos>"} | special))


def llama_of(rows):
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize("step, first", [(1, 2), (3, 10), (2, 2), (1, 40)])
def test_a_new_token_never_takes_the_row_of_another(step, first):
    words = dict.fromkeys(" ".join(PLAIN_WORDS.values()).split() + [f"w{i}" for i in range(20)])
    tokenizer = word_level({"<unk>": 0, "<eos>": 1} | {w: first + step * i for i, w in enumerate(words)})
    known = tokenizer.get_vocab()
    model = llama_of(max(known.values()) + 1)
    before, size = model.get_input_embeddings().weight.detach().clone(), len(tokenizer)
    try:
        qs.add_thinking_tokens(model, tokenizer)
    except ValueError as error:
        assert "of another" in str(error) and "fill the holes" in str(error) and len(tokenizer) == size
        assert step > 1 or first > 2
    else:
        ids = thinking_ids(tokenizer)
        assert not set(ids) & set(known.values()) and max(ids) < model.get_input_embeddings().num_embeddings
    after = model.get_input_embeddings().weight
    assert all(torch.equal(before[i], after[i]) for i in known.values())


def test_the_greatest_id_has_a_row_and_ends_a_line_where_ids_have_a_hole():
    """The tokenizer counts fewer tokens than its greatest id."""
    for rows in (91, 12):
        tokenizer, model = word_level({"<unk>": 0, "<eos>": 1, "a": 2, "\n": 90}), llama_of(rows)
        qs.add_thinking_tokens(model, tokenizer)
        assert len(tokenizer) == 12 and thinking_ids(tokenizer) == list(range(4, 12))
        assert model.get_input_embeddings().num_embeddings == 91 and line_ends(tokenizer) == [90]


@pytest.mark.parametrize("eos", [None, "</s>", "<|im_end|>"])
def test_a_tokenizer_without_end_of_text_is_refused_before_anything_is_changed(eos, tmp_path):
    model, tokenizer = tiny_champion()
    model.save_pretrained(tmp_path)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    if eos:  # one that is named and not there
        tokenizer._special_tokens_map["eos_token"] = eos
    size = len(tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token: set tokenizer.eos_token"):
        qs.add_thinking_tokens(model, tokenizer)
    assert len(tokenizer) == size
    with pytest.raises(ValueError, match="no end-of-text token"):
        qs.load_champion(tmp_path)


def test_padding_is_end_of_text_where_there_is_none():
    model, tokenizer = tiny_champion()
    tokenizer.pad_token = None
    qs.add_thinking_tokens(model, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert padded(tokenizer, [[7], [8, 9]])[0].tolist() == [[7, tokenizer.eos_token_id], [8, 9]]


@pytest.mark.parametrize("tag", ["<step>", "<think>", "</think>", "<doubt>"])
@pytest.mark.parametrize("where", ["random", "every", "question"])
def test_a_tag_in_the_text_is_text(tag, where):
    model, tokenizer = tiny_quiet_star(num_thoughts=2, thought_length=5)
    rows = [p | {"question": f"{tag} {p['question']} {tag}{tag} ?"} for p in problems(size=4)]
    ids = encode_context(tokenizer, rows[0]["question"])
    assert not set(ids) & set(thinking_ids(tokenizer))
    settings = {
        "num_thoughts": 2,
        "thought_length": 5,
        "evaluate_every": 1,
        "num_positions": 4,
        "use_curriculum": False,
    }
    result = qs.train_quiet_star(model, tokenizer, rows, rows[:2], steps=1, batch_size=2, think_at=where, **settings)
    assert torch.isfinite(torch.tensor(result.history[0]["loss"]))


TEMPLATE = (
    "{{bos_token}}{% for m in messages %}<|User|>{{m['content']}}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>\nENDING{% endif %}"
)


@pytest.mark.parametrize(
    "ending",
    [
        "<think>\n",
        "<think>",
        "<think>\n\n</think>\n\n",
        "</think>",
        "<thinking>",
        "[THINK]",
        "\u25c1think\u25b7",
        "<|START_THINKING|>\n",
    ],
)
def test_a_thought_that_the_template_opens_is_left_to_the_model(ending):
    tokenizer = build_tokenizer("gsm8k", ["I think step by step about 12 parts ; the answer is done ."] * 40, 400)
    model = build_champion(tokenizer, hidden_size=32, heads=2, intermediate_size=48)
    qs.add_thinking_tokens(model, tokenizer)
    start, end = thinking_ids(tokenizer)[:2]
    for given, left in ((ending, ""), ("", ""), ("<answer>", "<answer>")):
        tokenizer.chat_template = TEMPLATE.replace("ENDING", given)
        asked = tokenizer.decode(encode_context(tokenizer, "How many <think> tags?"))
        assert asked == f"<bos><|User|>How many < think> tags?<|Assistant|>\n{left}Answer:"
        whole = encode(tokenizer, "How many?", "<think> step 3 + 4 = 7 </think> 7 .").ids
        assert whole.count(start) == whole.count(end) == 1


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", None]
)
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_a_tokenizer_is_loaded_as_it_was_saved_whatever_its_class(name, family, tmp_path):
    raw = Tokenizer(models.BPE())
    raw.decoder, level = decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), level])
    bpe = {"vocab_size": 400, "special_tokens": ["<bos>", "<eos>"], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(["step 125 and 347 parts"] * 50, trainers.BpeTrainer(initial_alphabet=alphabet, **bpe))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    found = load_tokenizer(tmp_path, local_files_only=True)
    assert found.tokenize("step 125 and 7") == tokenizer.tokenize("step 125 and 7") and len(found) == len(tokenizer)
    assert "token_type_ids" not in found("step")


def with_a_space_first(kind):
    """As Llama-2's, which puts a space before every text, or one that cuts the space before a number or word off."""
    texts = [f"{' '.join(PLAIN_WORDS.values())} so the answer is 125 and 347 parts ."] * 40
    if kind == "llama-2":
        raw = Tokenizer(models.BPE(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
        state = json.loads(raw.to_str()) | {"pre_tokenizer": None}
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        prepended = {"type": "Prepend", "prepend": "\u2581"}
        state["normalizer"] = {"type": "Sequence", "normalizers": [prepended, replaced]}
        state["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
        raw = Tokenizer.from_str(json.dumps(state))
    else:
        raw = Tokenizer(models.BPE())
        cut = r" |\p{N}" if kind == "every word" else r"\p{N}|\s(?=\p{N})"
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "every word")
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated"), level])
        raw.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        special = ["<unk>", "</s>"]
        raw.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", model_max_length=64)
    return qs.add_thinking_tokens(build_champion(tokenizer, hidden_size=32, heads=2, intermediate_size=48), tokenizer)[
        1
    ]


@pytest.mark.parametrize("kind", ["llama-2", "every number"])
def test_words_behind_a_bare_space_are_told_apart(kind):
    tokenizer = with_a_space_first(kind)
    spellings = marker_spellings(tokenizer)
    assert len({ids[0] for ids in spellings.values()}) == 8 and all(
        tokenizer.decode(i).strip() for i in spellings.values()
    )
    written = encode_reply(tokenizer, "think parts 125 step 125 and 347 done 125 .")
    marked, last = mark(written, spellings)
    start, end, step, _, parts = thinking_ids(tokenizer)[:5]
    assert [i for i in marked if i in spellings] == [start, parts, step, end] and marked[0] == start
    assert last[-1] == len(written) - 1 and answer_of(tokenizer, marked, (end,)) == "125"
    first = encode(tokenizer, "so", "think").ids
    assert tokenizer.decode(first[:-1]).replace(" ", "") == "sothink"


def test_a_tokenizer_that_cuts_every_space_off_is_named():
    with pytest.raises(ValueError, match="cuts the space before every word off.*take another tokenizer"):
        marker_spellings(with_a_space_first("every word"))
