"""QuietStarForCausalLM around other families: tied and untied heads, learned positions, soft caps, sliding windows."""

import json
import math
from functools import cache, partial

import naive
import pytest
import torch
from test_baking import small_bake
from test_model import open_gate
from test_thoughts import close, think
from tiny import problems, tiny_champion, tiny_lm
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    TextStreamer,
    pipeline,
)

import qs_lib as qs
from qs_lib.data.tokens import thinking_ids
from qs_lib.errors import WorkbookError
from qs_lib.model import QuietStarForCausalLM
from qs_lib.thoughts import fallback
from qs_lib.thoughts.attention import backbone
from qs_lib.thoughts.rescore import rescore_thoughts
from qs_lib.workbook import figures

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "gpt2": (GPT2Config, {}),
    "gemma2, window 6": (Gemma2Config, {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "mistral, window 6": (MistralConfig, {"head_dim": 16, "sliding_window": 6}),
}
TEXTS = ["ben has 9 pens . ben finds 8 . how many pens ?", "tom has 3 .", "a box holds 4 red 5 blue cups ."]
every_family = pytest.mark.parametrize("family", FAMILIES)


def plain(family):
    """A random model of the family without thinking tokens, and the pocket tokenizer."""
    tokenizer = tiny_champion()[1]
    kind, settings = FAMILIES[family]
    shape = (
        SHAPE
        if kind is not GPT2Config
        else {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
    )
    torch.manual_seed(0)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return AutoModelForCausalLM.from_config(
        kind(vocab_size=len(tokenizer), **shape, **ends, **settings)
    ).eval(), tokenizer


@cache
def wrapped(family, n_true=9):
    lm, tokenizer = qs.add_thinking_tokens(*plain(family))
    model = QuietStarForCausalLM.from_base(
        lm, tokenizer, num_thoughts=2, thought_length=6, thought_temperature=0.0, n_true=n_true
    )
    open_gate(model, 0.5)
    return model, tokenizer


def batch_of(tokenizer, texts=TEXTS):
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@every_family
def test_adding_tokens_leaves_old_logits_and_adding_again_changes_nothing(family):
    model, tokenizer = plain(family)
    ids, size = torch.tensor([tokenizer.encode(TEXTS[0])]), len(tokenizer)
    before = model(ids).logits
    qs.add_thinking_tokens(model, tokenizer)
    assert torch.equal(model(ids).logits[..., :size], before)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    qs.add_thinking_tokens(model, tokenizer)
    assert len(tokenizer) == size + 8 == model.config.vocab_size
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@every_family
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_saved_model_comes_back_to_the_bit_with_its_head_and_its_ties(tmp_path, family, shard):
    model, tokenizer = wrapped(family)
    batch = batch_of(tokenizer)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard != "5GB"
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "8KB")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert again.mixing_head.gate.bias.item() == 0.5
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family != "llama, untied" and "mistral" not in family) and tied == (
        again.get_output_embeddings().weight is again.get_input_embeddings().weight
    )
    for thinks in (False, True):
        assert torch.equal(again(**batch, think=thinks).logits, model(**batch, think=thinks).logits)


@every_family
def test_the_wrapped_model_can_be_loaded_alone(tmp_path, family):
    model, tokenizer = wrapped(family)
    model.save_pretrained(tmp_path / "wrapped")
    model.lm.save_pretrained(tmp_path / "base")
    given = json.loads((tmp_path / "wrapped" / "config.json").read_text())["text_config"]
    from_wrapped = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wrapped", config=AutoConfig.for_model(**given), key_mapping={r"^lm\.": ""}
    )
    batch = batch_of(tokenizer)
    expected = model.lm(**batch).logits
    for alone in (from_wrapped, AutoModelForCausalLM.from_pretrained(tmp_path / "base")):
        assert type(alone) is type(model.lm) and torch.equal(alone(**batch).logits, expected)


def reference_reply(model, ids, thoughts, steps):
    """No cache, no padding: read text + thought + written text again for every token."""
    written = []
    for _ in range(steps):
        rows = [ids + written] + [ids + t + written for t in thoughts]
        hidden = torch.stack([backbone(model.lm)(torch.tensor([r])).last_hidden_state[0, -1] for r in rows])
        written.append(model.mix(hidden[0], hidden[1:]).argmax().item())
    return written


@every_family
def test_cached_generation_with_thoughts_equals_a_reference_on_left_padded_rows(family):
    model, tokenizer = wrapped(family)
    batch = batch_of(tokenizer)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=-1, return_dict_in_generate=True)
    drawn = out.past_key_values.thoughts[0]
    for row, text in enumerate(TEXTS):
        thoughts = [t[:n] for t, n in zip(drawn.tokens[row, 0].tolist(), drawn.lengths[row, 0].tolist(), strict=True)]
        assert out.sequences[row, -8:].tolist() == reference_reply(model, tokenizer.encode(text), thoughts, 8)


@every_family
def test_without_thoughts_it_generates_as_the_base_does(family):
    model, tokenizer = wrapped(family)
    settings = batch_of(tokenizer) | {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**settings, think=False), model.lm.generate(**settings))


@pytest.mark.parametrize("family", ["llama, tied", "mistral, window 6"])
def test_beams_of_a_batch_are_those_of_its_rows_alone(family):
    model, tokenizer = wrapped(family, n_true=2)
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    together = model.generate(**batch_of(tokenizer), **settings)
    for row, text in enumerate(TEXTS):
        alone = model.generate(**batch_of(tokenizer, [text]), **settings)
        assert torch.equal(alone[0, -5:], together[row, -5:])


def test_thoughts_follow_the_beams_they_belong_to():
    model, tokenizer = wrapped("llama, tied", n_true=2)
    out = model.generate(
        **batch_of(tokenizer),
        num_beams=3,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=-1,
        return_dict_in_generate=True,
    )
    state = out.past_key_values
    for drawn, length in zip(state.thoughts, (0, 2, 4), strict=True):
        start = batch_of(tokenizer)["input_ids"].shape[1] + length
        again = model.think(state.ids[:, :start], state.mask[:, :start], torch.full((9, 1), start - 1))
        assert torch.equal(again.tokens, drawn.tokens), f"thoughts after {length} tokens belong to other beams"


def test_sampling_repeats_itself_and_several_replies_differ():
    model, tokenizer = wrapped("llama, tied")
    settings = {
        "max_new_tokens": 6,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "num_return_sequences": 3,
    }
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(model.generate(**batch_of(tokenizer), **settings))
    assert torch.equal(*runs) and len(runs[0]) == 9 and len({tuple(row) for row in runs[0][:3].tolist()}) > 1
    assert not set(runs[0][:, -6:].flatten().tolist()) & set(thinking_ids(tokenizer))


def test_pipeline_and_streamer_give_what_generate_gives(tmp_path, capsys):
    model, tokenizer = wrapped("llama, tied")
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = [model.generate(**batch_of(tokenizer, [t]), **settings)[0] for t in TEXTS]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", str(tmp_path), device="cpu")
    for batch_size in (1, 3):
        found = write(TEXTS, batch_size=batch_size, return_full_text=False, **settings)
        for text, ids, answers in zip(TEXTS, expected, found, strict=True):
            new = tokenizer.decode(ids[len(tokenizer.encode(text)) :], skip_special_tokens=True)
            assert answers[0]["generated_text"].split() == new.split()
    plain_text = write(TEXTS[0], return_full_text=False, think=False, **settings)[0]["generated_text"]
    base = model.lm.generate(**batch_of(tokenizer, TEXTS[:1]), **settings)[0]
    assert (
        plain_text.split()
        == tokenizer.decode(base[len(tokenizer.encode(TEXTS[0])) :], skip_special_tokens=True).split()
    )
    capsys.readouterr()
    model.generate(**batch_of(tokenizer, TEXTS[:1]), streamer=TextStreamer(tokenizer, skip_prompt=True), **settings)
    assert capsys.readouterr().out.split() == tokenizer.decode(expected[0][len(tokenizer.encode(TEXTS[0])) :]).split()


def test_a_prompt_read_in_pieces_or_continued_thinks_at_its_end():
    model, tokenizer = wrapped("mistral, window 6")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    batch = batch_of(tokenizer)
    expected = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, prefill_chunk_size=5), expected)
    first = model.generate(**batch, **settings | {"max_new_tokens": 2}, return_dict_in_generate=True)
    more = torch.cat([first.sequences, batch["input_ids"][:, -3:]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    alone = model.generate(input_ids=more, attention_mask=mask, **settings)
    assert torch.equal(
        model.generate(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, **settings), alone
    )


def test_a_text_that_leaves_no_room_for_a_thought_is_one_sentence():
    for family in ("gpt2", "llama, tied"):
        model, _ = wrapped(family)
        ids = torch.full((1, 125), 7)
        if family == "gpt2":
            with pytest.raises(
                WorkbookError, match="a text of 125 tokens leaves no room for thoughts among the model's 128"
            ):
                model(ids, logits_to_keep=1)
        else:
            assert model(ids, logits_to_keep=1).logits.isfinite().any()  # rotary positions have no end


def test_what_thinking_cannot_do_is_one_sentence():
    model, tokenizer = wrapped("llama, tied")
    batch = batch_of(tokenizer, TEXTS[:1])
    foreign = model.lm(batch["input_ids"][:, :5], use_cache=True).past_key_values
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False, cache_implementation="static"), plain)
    for way in ({"prompt_lookup_num_tokens": 2}, {"past_key_values": foreign}):
        with pytest.raises(WorkbookError, match="think=False"):
            model.generate(**batch, max_new_tokens=5, do_sample=False, **way)


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "dynamic"])
def test_the_kind_of_cache_changes_no_reply_of_padded_rows(kind):
    model, tokenizer = wrapped("llama, tied")
    settings = batch_of(tokenizer) | {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(**settings, cache_implementation=kind), model.generate(**settings))


def test_a_mask_with_four_dimensions_is_one_sentence():
    model, tokenizer = wrapped("llama, tied")
    ids = batch_of(tokenizer)["input_ids"]
    with pytest.raises(WorkbookError, match=r"attention_mask that is not \(batch, length\)"):
        model(ids, attention_mask=torch.ones(3, 1, ids.shape[1], ids.shape[1]))


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
ROPES = {
    "llama, dynamic": (LlamaConfig, {"rope_type": "dynamic", "factor": 4.0}, 15),
    "qwen2, dynamic": (Qwen2Config, {"rope_type": "dynamic", "factor": 2.0}, 15),
    "phi3, longrope": (Phi3Config, LONGROPE | {"original_max_position_embeddings": 16}, 15),
    "llama, longrope": (LlamaConfig, LONGROPE | {"original_max_position_embeddings": 16}, 15),
    "llama, linear": (LlamaConfig, {"rope_type": "linear", "factor": 4.0}, None),
    "llama, yarn": (LlamaConfig, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, None),
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_positions_that_depend_on_the_length_are_exact_or_one_sentence(rope):
    kind, parameters, room = ROPES[rope]
    parameters = parameters | {"rope_theta": 10000.0}
    most = 64 if "original_max_position_embeddings" in parameters else 16
    ends = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4, "vocab_size": 60}
    torch.manual_seed(0)
    config = kind(**SHAPE | {"max_position_embeddings": most} | ends, rope_parameters=parameters)
    model = AutoModelForCausalLM.from_config(config).eval()
    if kind is Phi3Config:
        config.original_max_position_embeddings = 16
    model(torch.full((1, 40), 7))  # a long text before must not matter
    for length in (6, 9, 13, 24):
        ids = torch.randint(5, 60, (1, length))
        ask = partial(think, model, ids, None, torch.tensor([[2, length - 1]]), thought_length=6)
        if room and length + 6 > room:
            with pytest.raises(WorkbookError, match=f"a text of {length} tokens leaves no room"):
                ask()
            continue
        thoughts = ask()
        scored = rescore_thoughts(model, ids, thoughts, n_true=1)
        expected = naive.rescore(model, ids, thoughts, n_true=1)
        close(scored.thought_logprobs, expected["thought_logprobs"], 1e-4)
        close(thoughts.logprobs, expected["thought_logprobs"], 1e-4)


TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 32},
    "biogpt": {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 8},
}


@pytest.mark.filterwarnings("ignore:.*cannot share text")
@pytest.mark.parametrize("family", TABLES)
def test_a_text_beyond_the_table_of_positions_is_one_sentence_everywhere(family):
    tokenizer = tiny_champion()[1]
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2} if "hidden_size" in TABLES[family] else {}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **TABLES[family], **heads, **ends)
    lm = qs.add_thinking_tokens(AutoModelForCausalLM.from_config(config).eval(), tokenizer)[0]
    model = QuietStarForCausalLM.from_base(lm, tokenizer, num_thoughts=2, thought_length=6, n_true=3)
    drawn = model.think(torch.full((1, 26), 9), positions=torch.tensor([[25]]))  # 26 + 6 tokens: just enough
    asked = {
        "one more token": lambda: qs.generate_thoughts(lm, torch.full((1, 27), 9), thought_length=6),
        "true tokens": lambda: qs.rescore_thoughts(lm, torch.full((1, 30), 9), drawn, n_true=4),
        "writing on": lambda: model.generate(torch.full((1, 24), 9), max_new_tokens=6, eos_token_id=-1),
        "reading": lambda: model.read(torch.full((1, 33), 9)),
    }
    drawn.lengths.fill_(6)
    for what, ask in asked.items():
        with pytest.raises(WorkbookError, match="leaves no room for thoughts among the model's 32 positions"):
            ask()
            pytest.fail(what)


def is_watched(family):
    """Gemma-2 has no sdpa attention that would show its logits; it trains without that number."""
    return not family.startswith("gemma2")


@every_family
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_step_of_reinforcement_on_any_family(family, gradient_checkpointing):
    lm, tokenizer = qs.add_thinking_tokens(*plain(family))
    model = QuietStarForCausalLM.from_base(lm, tokenizer, num_thoughts=2, thought_length=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = qs.train_quiet_star(
        model,
        tokenizer,
        problems(size=12),
        problems("validation")[:2],
        steps=1,
        batch_size=2,
        num_thoughts=2,
        thought_length=6,
        evaluate_every=1,
        gradient_checkpointing=gradient_checkpointing,
    )
    assert math.isfinite(result.history[0]["loss"]) and len(result.episodes) == 2
    assert ("max_logit" in result.history[0]) == is_watched(family)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_family
def test_baking_on_any_family(monkeypatch, family):
    model, tokenizer = qs.add_thinking_tokens(*plain(family))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = small_bake(monkeypatch, model, tokenizer, epochs=1)
    assert math.isfinite(result.gap_closed) and ("max_logit" in result.epochs[0]) == is_watched(family)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_curves_without_the_largest_logit():
    rows = [{"step": 1, "loss": 2.0, "reward": 0.1}, {"step": 2, "loss": 1.0, "reward": 0.2}]
    assert len(figures.training_curves(rows).axes[-1].lines) == 0


@pytest.mark.parametrize("train", ["baking", "reinforcement"])
def test_clipping_what_cannot_be_watched_is_one_sentence_before_anything_is_trained(monkeypatch, train):
    lm, tokenizer = qs.add_thinking_tokens(*plain("gemma2, window 6"))
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    with pytest.raises(WorkbookError, match="logits cannot be watched: set qk_clip_threshold to 0"):
        if train == "baking":
            small_bake(monkeypatch, lm, tokenizer, qk_clip_threshold=30.0)
        else:
            qs.train_quiet_star(
                QuietStarForCausalLM.from_base(lm, tokenizer),
                tokenizer,
                problems(),
                problems("validation"),
                steps=1,
                qk_clip_threshold=25.0,
            )
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


class RoundedProducts(TorchFunctionMode):
    """Multiply float32 matrices as a GPU does with TF32: ten bits of each factor's fraction."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__", "__rmatmul__"):
            arguments = [a.half().float() if getattr(a, "dtype", None) == torch.float32 else a for a in arguments]
        return function(*arguments, **(keywords or {}))


def test_a_causal_model_is_served_where_float32_products_are_rounded():
    model, _ = tiny_lm()
    with RoundedProducts():
        assert fallback.shares_prefix(model)
        assert fallback._rounds_products(torch.zeros(1))
    assert not fallback._rounds_products(torch.zeros(1))
