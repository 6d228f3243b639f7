import pytest
import torch
from tiny import tiny_champion, tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import qs_lib as qs
from qs_lib.champion import build_champion, build_tokenizer
from qs_lib.data.tokens import PLAIN_WORDS, encode, length_batches, mark, marker_spellings, padded, thinking_ids


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


def test_new_rows_have_the_norm_of_real_rows():
    model, tokenizer = tiny_lm()
    weight = model.get_input_embeddings().weight
    new, old = weight[thinking_ids(tokenizer)].norm(dim=1), weight[: len(tokenizer) - 8].norm(dim=1)
    assert torch.allclose(new, old.median().expand(8), rtol=1e-4)


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
