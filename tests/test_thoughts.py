"""Parallel thoughts against the naive reference: same log-probs, states and gradients, whatever the batch."""

import copy
from dataclasses import replace

import naive
import pytest
import torch
import transformers as tf

from qs_lib.errors import WorkbookError
from qs_lib.thoughts import attention, checks, fallback, generate, prefix, sampler
from qs_lib.thoughts.generate import generate_thoughts
from qs_lib.thoughts.rescore import rescore_thoughts

THINK, END = 1, 2
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": (tf.LlamaConfig, {}),
    "gpt2": (tf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen2": (tf.Qwen2Config, {}),
    "mistral_sliding": (tf.MistralConfig, {"sliding_window": 6}),
    "gemma2": (tf.Gemma2Config, WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt_oss": (
        tf.GptOssConfig,
        WINDOW
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen2_sliding": (tf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 8}),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "gemma": (tf.GemmaConfig, {"head_dim": 8}),
    "gemma3": (tf.Gemma3TextConfig, WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": (tf.PhiConfig, {}),
    "phi3": (tf.Phi3Config, {}),
    "olmo2": (tf.Olmo2Config, {}),
    "olmo3": (tf.Olmo3Config, WINDOW),
    "gpt_neox": (tf.GPTNeoXConfig, {}),
    "smollm3": (tf.SmolLM3Config, {}),
    "opt": (tf.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "cohere2": (tf.Cohere2Config, WINDOW | {"logit_scale": 0.25}),
    "granite": (tf.GraniteConfig, {"logits_scaling": 2.0, "attention_multiplier": 0.3}),
    "starcoder2": (tf.Starcoder2Config, {"sliding_window": 6}),
    "stablelm": (tf.StableLmConfig, {}),
    "glm4": (tf.Glm4Config, {"head_dim": 8}),
    "mixtral": (tf.MixtralConfig, MOE | {"num_local_experts": 4}),
    "qwen2_moe": (tf.Qwen2MoeConfig, MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": (tf.Qwen3MoeConfig, MOE | {"num_experts": 4, "head_dim": 8}),
    "deepseek_v3": (
        tf.DeepseekV3Config,
        MOE
        | {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
        },
    ),
}


def build(family, dtype=torch.float32):
    config, extra = FAMILIES[family] if family in FAMILIES else UNSHARED[family]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(**{**SMALL, **extra})).to(dtype).eval()
    if dtype == torch.float64 and hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


def batch(length=11):
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (3, length))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return ids, mask


def think(model, ids, mask=None, positions=None, seed=3, **options):
    # Few tokens are left to sample, so that many thoughts end early.
    options = {
        "num_thoughts": 3,
        "thought_length": 7,
        "think_id": THINK,
        "end_id": END,
        "forbid": range(5, 48),
    } | options
    generator = torch.Generator().manual_seed(seed)
    return generate_thoughts(model, ids, mask, positions, generator=generator, **options)


def close(found, expected, tolerance, name="", relative=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=relative, msg=lambda text: f"{name}: {text}")


SUBSET = torch.tensor([[10, 5], [3, -1], [-1, 2]])
LAST = torch.tensor([[10], [7], [0]])


def check(model, ids, mask, positions, **options):
    """Generates, re-scores and compares with the naive reference; returns the thoughts."""
    thoughts = think(model, ids, mask, positions, **options)
    with torch.no_grad():
        expected = naive.rescore(model, ids, thoughts, mask, forbid_true=(THINK, END))
        result = rescore_thoughts(model, ids, thoughts, mask, forbid_true=(THINK, END), true_logits=True)
        less = rescore_thoughts(model, ids, thoughts, mask, forbid_true=(THINK, END), true_logits=True, after=False)
    for name in ("thought_logprobs", "base_logprobs", "base_full", "base_hidden"):
        close(getattr(less, name), getattr(result, name), 1e-5, name)
    assert less.true_logprobs is less.true_full is less.thought_hidden is None
    close(thoughts.logprobs, expected["thought_logprobs"], 2e-5, relative=0)
    close(thoughts.hidden, expected["thought_hidden"][..., 0, :], 1e-4)
    for name, value in expected.items():
        if "hidden" in name:
            close(getattr(result, name), value, 1e-4, name)
        else:
            close(getattr(result, name), value, 2e-5, name, relative=0)
    return thoughts


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_plain_forward(family):
    model = build(family)
    ids, mask = batch()
    thoughts = check(model, ids, mask, None, temperature=2.0)
    lengths = thoughts.lengths[thoughts.positions >= 0]
    assert (lengths < 7).any() and (lengths == 7).any() and (thoughts.positions < 0).sum() == 7
    check(model, ids, None, SUBSET)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_sliding", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [{"num_thoughts": 1}, {"thought_length": 2}, {"thought_length": 3}, {"temperature": 0.6}, {"max_streams": 4}],
    ids=str,
)
def test_shapes_equal_plain_forward(family, options):
    model = build(family)
    ids, mask = batch()
    check(model, ids, mask, LAST, **options)
    check(model, ids, mask, SUBSET, **options)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gpt_oss"])
def test_in_small_pieces(family, monkeypatch):
    """Many tiles, many chunks of logits, and the loop for long own parts give the same."""
    for module, name, value in (
        (prefix, "_STEP_TILE", 8),
        (prefix, "_PACKED_TILE", 16),
        (prefix, "_FEW_NUMBERS", 0),
        (attention, "_LOGIT_NUMBERS", 600),
        (attention, "_CAUSAL_BLOCK", 4),
    ):
        monkeypatch.setattr(module, name, value)
    model = build(family)
    ids, mask = batch()
    thoughts = check(model, ids, mask, None, temperature=2.0)
    expected, found = (gradients(model, ids, mask, thoughts, score) for score in (naive.rescore, rescore_thoughts))
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("seed", range(3))
def test_texts_of_equal_length_with_thoughts_of_different_length(family, seed):
    """Rows that see as many tokens of their texts share a mask, but not where a window moves with each thought."""
    model = build(family)
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(seed))
    thoughts = check(model, ids, None, torch.full((3, 1), 8), temperature=8.0, forbid=range(10, 60))
    assert len(thoughts.lengths.unique()) > 1
    expected, found = (gradients(model, ids, None, thoughts, score) for score in (naive.rescore, rescore_thoughts))
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_without_the_fused_operation(family, monkeypatch):
    monkeypatch.setattr(attention, "_CPU_FLASH", None)
    monkeypatch.setattr(prefix, "_KEPT_NUMBERS", 0)
    model = build(family)
    ids, mask = batch()
    thoughts = check(model, ids, mask, None)
    expected, found = (gradients(model, ids, mask, thoughts, score) for score in (naive.rescore, rescore_thoughts))
    for a, b in zip(found, expected):
        if a is not None and b is not None:
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-5


def gradients(model, ids, mask, thoughts, score):
    result, total = score(model, ids, thoughts, mask), 0
    for name, value in (result if isinstance(result, dict) else vars(result)).items():
        if value is not None and value.is_floating_point() and "full" not in name:
            weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
            total = total + (value * weights.to(value.dtype)).sum()
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_plain_forward(family):
    model = build(family, torch.float64)
    ids, mask = batch()
    thoughts = think(model, ids, mask, SUBSET, temperature=0.8)
    expected = gradients(model, ids, mask, thoughts, naive.rescore)
    found = gradients(model, ids, mask, thoughts, rescore_thoughts)
    for (name, _), a, b in zip(model.named_parameters(), found, expected):
        if a is None or b is None:
            assert a is b, name
        else:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "qwen2_moe"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(family):
    model, (ids, mask) = build(family), batch()
    thoughts = think(model, ids, mask, SUBSET)

    def kept_and_gradients():
        sizes, storages = [], set()

        def keep(x):
            if x.untyped_storage().data_ptr() not in storages:
                storages.add(x.untyped_storage().data_ptr())
                sizes.append(x.untyped_storage().nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            scored = rescore_thoughts(model, ids, thoughts, mask, n_true=2)
            kept = sum(sizes)
            (scored.thought_logprobs.sum() + scored.true_logprobs.square().sum()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return kept, found

    all_kept, expected = kept_and_gradients()
    attention.recompute_layers(model)
    model.train()  # dropout stays off all the same
    kept, found = kept_and_gradients()
    assert kept < 0.8 * all_kept and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any("forward" in vars(module) for module in model.modules()) and model.training


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_autocast_shares_the_text_and_stays_near_float32(family, recwarn):
    model, (ids, mask) = build(family), batch()
    thoughts = think(model, ids, mask, SUBSET)

    def scores(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            drawn = think(copy.deepcopy(model), ids, mask, SUBSET)
            scored = rescore_thoughts(model, ids, thoughts, mask, n_true=2)
        (scored.thought_logprobs.sum() + scored.true_logprobs.sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return drawn, scored, gradient

    (_, plain, plain_gradient), (drawn, cast, gradient) = scores(False), scores(True)
    assert not [w for w in recwarn if "cannot share" in str(w.message)]
    assert cast.thought_logprobs.dtype == torch.float32 and drawn.logprobs.isfinite().all()
    assert 0 < (cast.thought_logprobs - plain.thought_logprobs).abs().max() < 0.3
    assert torch.nn.functional.cosine_similarity(gradient, plain_gradient, dim=0) > 0.98


def wrong_limit(shift):
    before = prefix.Grid.__init__

    def wrong(self, row, limit, place, tile):
        before(self, row, (limit + shift).clamp(1, limit.max()), place, tile)

    return prefix.Grid, "__init__", wrong


def wrong_place(shift):
    before = prefix.forward

    def wrong(base, tokens, places, work):
        return before(base, tokens, places + shift * isinstance(work, prefix.StepPass), work)

    return prefix, "forward", wrong


def without_own_past(shift):
    before = prefix.StepPass._own
    return (
        prefix.StepPass,
        "_own",
        staticmethod(lambda query, own, *rest: before(query, own[:, shift:] if own.shape[1] > shift else own, *rest)),
    )


@pytest.mark.parametrize("fault, shift", [(wrong_limit, -1), (wrong_limit, 1), (wrong_place, 1), (without_own_past, 1)])
def test_planted_faults_are_noticed(fault, shift, monkeypatch):
    """Each fault turns the equality check red, sampling and re-scoring apart, and the probe as well."""
    model = build("llama")
    ids, mask = batch()
    sound = check(model, ids, mask, SUBSET)
    with torch.no_grad():
        expected = naive.rescore(model, ids, sound, mask)["thought_logprobs"]
    monkeypatch.setattr(*fault(shift))
    monkeypatch.setattr("qs_lib.thoughts.generate.shares_prefix", lambda model: True)
    monkeypatch.setattr("qs_lib.thoughts.rescore.shares_prefix", lambda model: True)
    with pytest.raises(AssertionError):
        check(model, ids, mask, SUBSET)
    if fault is wrong_limit:
        with torch.no_grad():
            result = rescore_thoughts(model, ids, sound, mask)
        assert (result.thought_logprobs - expected).abs().max() > 0.1
    assert fallback._reason(model) == "the result differs from a plain forward"


def test_the_bound_of_notebook_04_follows_from_the_models_own_rounding_and_a_fault_is_above_it():
    """Larger weights round more. A sampler's log-prob that is off by a thousandth is still noticed."""
    found = []
    for scale in (1.0, 4.0):
        model, ids = build("llama"), torch.randint(5, 60, (1, 20), generator=torch.Generator().manual_seed(1))
        model.load_state_dict({name: scale * value for name, value in model.state_dict().items()})
        thoughts = think(model, ids, positions=torch.tensor([[9, 19]]))
        rounding = checks.own_rounding(model, ids, thoughts)
        assert 0 < rounding < 2e-3 and checks.own_rounding(model.double(), ids, thoughts) < 1e-3 * rounding
        found.append(rounding)
        bound = max(2e-5, 4 * rounding)
        assert checks.largest_difference(model.float(), ids, thoughts) < bound < 1e-3
        wrong = replace(thoughts, logprobs=thoughts.logprobs + 1e-3)
        assert checks.largest_difference(model, ids, wrong) > bound
    assert found[1] > found[0]


def test_training_goes_on_after_sampling():
    """Sampling in inference mode leaves nothing in the model or its results that autograd cannot use.

    Dynamic rotary embeddings change their buffer when a text is longer than any before.
    """
    config, _ = FAMILIES["llama"]
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(
        config(**SMALL | {"max_position_embeddings": 16, "rope_parameters": rope})
    ).train()
    ids, mask = batch()
    thoughts = think(model, ids, mask, SUBSET)
    assert not any(x.is_inference() for x in (thoughts.hidden, thoughts.tokens, thoughts.logprobs))
    assert not any(p.is_inference() for p in model.parameters())
    result = rescore_thoughts(model, ids, thoughts, mask)
    weight = torch.ones_like(thoughts.hidden, requires_grad=True)
    (result.thought_logprobs.sum() + (weight * thoughts.hidden).sum() + model(ids, labels=ids).loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None) and weight.grad.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss", "mistral_sliding"])
def test_cuda_equals_cpu(family):
    """Without the fused CPU operation, on the device: log-probs of the CPU's thoughts, and of its own."""
    model, (ids, mask) = build(family), batch()
    there = copy.deepcopy(model).cuda()
    thoughts = think(model, ids, mask)
    moved = thoughts.map(torch.Tensor.cuda)
    with torch.no_grad():
        expected = rescore_thoughts(model, ids, thoughts, mask)
        found = rescore_thoughts(there, ids.cuda(), moved, mask.cuda())
        drawn = think(there, ids.cuda(), mask.cuda())
        again = rescore_thoughts(there, ids.cuda(), drawn, mask.cuda())
    close(found.thought_logprobs.cpu(), expected.thought_logprobs, 1e-3)
    close(found.true_logprobs.cpu(), expected.true_logprobs, 1e-3)
    close(drawn.logprobs, again.thought_logprobs, 1e-3)


def test_tokens_do_not_depend_on_the_batch():
    model = build("llama")
    ids, mask = batch()
    whole = think(model, ids, mask)
    for size in (1, 7, 40):
        again = think(model, ids, mask, max_streams=size)
        assert torch.equal(whole.tokens, again.tokens) and torch.equal(whole.lengths, again.lengths)
    bare = think(model, ids[:1, 4:])
    assert torch.equal(whole.tokens[:1, 4:], bare.tokens)
    behind = torch.cat([ids[:1, 4:], ids[:1, :3]], 1)
    real = torch.arange(10).unsqueeze(0) < 7
    assert torch.equal(bare.tokens, think(model, behind, real.long()).tokens[:, :7])
    some = think(model, ids, mask, SUBSET)
    assert torch.equal(some.tokens[0, 1], whole.tokens[0, 5]) and torch.equal(some.tokens[0, 0], whole.tokens[0, 10])
    assert not torch.equal(whole.tokens, think(model, ids, mask, seed=4).tokens)


@pytest.mark.parametrize("length", [2, 3, 7])
def test_tokens_without_states_are_the_same(length):
    model = build("llama")
    ids, mask = batch()
    for positions in (None, LAST):
        whole = think(model, ids, mask if positions is None else None, positions, thought_length=length)
        bare = think(
            model, ids, mask if positions is None else None, positions, thought_length=length, with_hidden=False
        )
        assert bare.hidden is None
        for name in ("tokens", "logprobs", "sampled", "lengths"):
            assert torch.equal(getattr(whole, name), getattr(bare, name)), name


def test_equal_beginnings_are_read_once(monkeypatch):
    """Thoughts share what they have in common: each beginning is read once in sampling, each thought in re-scoring."""
    monkeypatch.setattr(generate, "_COMPACT_BELOW", 1.0)  # what has ended is not read on
    model, (ids, mask) = build("llama", torch.float64), batch()
    options = {"num_thoughts": 8, "forbid": range(4, 58), "temperature": 0.7}
    check(model, ids, mask, LAST, **options)
    read = []
    with model.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0].numel())):
        thoughts = think(model, ids, mask, LAST, with_hidden=False, **options)
        sampled = sum(read[1:])  # the first reads the texts
        with torch.no_grad():
            rescore_thoughts(model, ids, thoughts, mask, n_true=1)
    groups = [[t[:n] for t, n in zip(*row)] for row in zip(thoughts.tokens[:, 0].tolist(), thoughts.lengths[:, 0])]
    begun = [{tuple(t[:n]) for t in group if len(t) > n} for group in groups for n in range(2, 6)]
    assert sampled == sum(map(len, begun)) < (thoughts.lengths - 2).clamp(min=0).sum()
    texts, whole = 7 + 8 + 1, [{tuple(t) for t in group} for group in groups]
    assert read[-1] == texts + sum(len(t) for group in whole for t in group)
    assert sum(map(len, whole)) < 20 and min(map(len, whole)) > 1
    found, expected = (gradients(model, ids, mask, thoughts, score) for score in (rescore_thoughts, naive.rescore))
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_rescoring_by_parts():
    model = build("llama")
    ids, mask = batch()
    thoughts = think(model, ids, mask, SUBSET)
    with torch.no_grad():
        whole = rescore_thoughts(model, ids, thoughts, mask)
        part = rescore_thoughts(model, ids[1:], thoughts.part(slice(1, 3), slice(1, 2)), mask[1:])
    for name, value in vars(part).items():
        if value is not None:
            close(value, getattr(whole, name)[1:, 1:], 2e-5, name)


def test_layout_of_thoughts():
    model = build("llama")
    ids, _ = batch()
    thoughts = think(model, ids, None, SUBSET)
    assert thoughts.tokens.shape == (3, 2, 3, 7) and thoughts.hidden.shape == (3, 2, 3, 32)
    none = thoughts.positions < 0
    assert (thoughts.lengths[none] == 0).all() and (thoughts.tokens[none] == END).all()
    for tokens, sampled, length in zip(
        thoughts.tokens[~none].view(-1, 7).tolist(),
        thoughts.sampled[~none].view(-1, 7).tolist(),
        thoughts.lengths[~none].flatten().tolist(),
    ):
        assert tokens[0] == THINK and THINK not in tokens[1:] and not any(5 <= t < 48 for t in tokens)
        assert tokens.index(END) == length - 1 and set(tokens[length:]) <= {END}
        # A sampled </think> counts; one forced at the last place does not.
        assert sampled == [0 < i < length and (i < 6) for i in range(7)]
    assert (thoughts.logprobs[~thoughts.sampled] == 0).all()

    class Words:
        def decode(self, ids):
            return " ".join(map(str, ids))

    text = thoughts.to_text(Words())
    assert text[1][1] == ["", "", ""] and text[0][0][0].startswith("1 ") and text[0][0][0].endswith(" 2")


def test_greedy_and_nucleus():
    model = build("gpt2")
    ids, _ = batch()
    greedy = think(model, ids, None, LAST, temperature=0)
    with torch.no_grad():
        result = rescore_thoughts(model, ids, greedy, true_logits=True)
    close(greedy.logprobs, result.thought_logprobs, 2e-5)
    assert torch.equal(greedy.tokens[:, :, 0], greedy.tokens[:, :, 1])
    nearly = think(model, ids, None, LAST, top_p=1e-6)
    assert torch.equal(nearly.tokens, greedy.tokens)
    check(model, ids, None, LAST, top_p=0.7)


def test_no_position_at_all():
    model = build("llama")
    ids, _ = batch()
    thoughts = think(model, ids, None, torch.full((3, 2), -1))
    result = rescore_thoughts(model, ids, thoughts)
    assert (thoughts.lengths == 0).all() and not result.valid.any()
    assert result.thought_hidden.shape == (3, 2, 3, 4, 32) and not result.true_logprobs.any()


def test_model_is_put_back():
    model = build("opt").train()
    model.model.decoder.layers[0].eval()
    flags = [module.training for module in model.modules()]
    ids, mask = batch()
    check(build("opt"), ids, mask, SUBSET)
    first, second = (think(model, ids, mask, SUBSET) for _ in range(2))
    close(first.logprobs, second.logprobs, 0)
    assert flags == [module.training for module in model.modules()]
    name = model.config._attn_implementation
    with pytest.raises(IndexError):
        think(model, ids + 1000, mask, SUBSET)
    assert model.config._attn_implementation == name and getattr(attention._local, "work", None) is None


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"positions": torch.tensor([[11], [0], [0]])}, "below 11"),
        ({"positions": torch.tensor([[0], [0], [0]])}, "padding"),
        ({"positions": torch.zeros(2, 1, dtype=torch.long)}, "LongTensor"),
        ({"positions": torch.ones(3, 11, dtype=torch.bool)}, "not torch.BoolTensor"),
        ({"mask": torch.ones(3, 4)}, "attention_mask has shape"),
        ({"think_id": None}, "think_token_id is not set"),
        ({"think_id": 60}, "must lie in"),
        ({"end_id": -1}, "end_id is -1, which is none of the model's tokens"),
        ({"forbid": (END,)}, "must stay possible"),
        ({"forbid": (60,)}, "must lie in"),
        ({"thought_length": 1}, "thought_length"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"num_thoughts": 0}, "num_thoughts"),
    ],
)
def test_wrong_input_is_named(wrong, match):
    ids, mask = batch()
    with pytest.raises(ValueError, match=match):
        think(build("llama"), ids, **{"mask": mask, **wrong})
    with pytest.raises(ValueError, match="batch, length"):
        think(build("llama"), ids[0])
    with pytest.raises(ValueError, match="n_true"):
        rescore_thoughts(build("llama"), ids, think(build("llama"), ids, None, LAST), n_true=0)
    with pytest.raises(ValueError, match="separate head"):
        think(build("llama").model, ids)


UNSHARED = {
    "bloom": (tf.BloomConfig, {"n_layer": 2, "n_head": 4}),
    "gptj": (tf.GPTJConfig, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "gpt_neo": (
        tf.GPTNeoConfig,
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    ),
    "falcon": (tf.FalconConfig, {"alibi": True}),
    "mamba": (tf.MambaConfig, {"state_size": 4}),
    "diffllama": (tf.DiffLlamaConfig, {}),
    "qwen3_next": (
        tf.Qwen3NextConfig,
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("family", UNSHARED)
def test_families_that_cannot_share_stay_exact(family):
    model = build(family)
    ids, mask = batch()
    with pytest.warns(UserWarning, match="cannot share text between thoughts"):
        check(model, ids, mask, SUBSET)
    check(model, ids, mask, LAST, num_thoughts=1, thought_length=2)


def test_probe_notices_a_window_it_is_not_told_and_errors(monkeypatch):
    model = build("llama")
    model.config.sliding_window = 5
    assert "sliding window" in fallback._reason(model)
    del model.config.sliding_window
    assert fallback._reason(model) is None

    def broken(*arguments):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(fallback, "packed_states", broken)
    assert "no such operation" in fallback._reason(model)


def test_models_that_cannot_be_served_say_so():
    ids, _ = batch()
    options = {"num_attention_heads": 4, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    both_ways = tf.BertLMHeadModel(tf.BertConfig(vocab_size=60, **options)).eval()
    with pytest.raises(NotImplementedError, match="not causal"):
        think(both_ways, ids)
    broken = build("llama")
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(WorkbookError, match="computes NaN or infinity: its weights are broken"):
        think(broken, ids)
    other_head = tf.BertLMHeadModel(tf.BertConfig(vocab_size=60, is_decoder=True, **options)).eval()
    with pytest.raises(NotImplementedError, match="computes its logits"):
        think(other_head, ids)
    shape = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 3, "rescale_every": 2}
    rescaled = tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=60, **shape)).eval()
    before = [p.clone() for p in rescaled.parameters()]
    with pytest.raises(NotImplementedError, match="load it with rescale_every=0"):
        think(rescaled, ids)
    assert all(torch.equal(*pair) for pair in zip(before, rescaled.parameters()))


def test_bfloat16_sampling_and_float32_scores():
    model = build("llama")
    ids, mask = batch()
    thoughts = think(copy.deepcopy(model).to(torch.bfloat16), ids, mask)
    with torch.no_grad():
        exact = rescore_thoughts(model, ids, thoughts, mask).thought_logprobs
    assert thoughts.logprobs.dtype == torch.float32
    assert (thoughts.logprobs - exact).abs()[thoughts.sampled].mean() < 0.1


@pytest.mark.parametrize("size", [40, 1000])
def test_sampler_draws_the_distribution(size):
    torch.manual_seed(0)
    logits, count = torch.randn(size) * 2, 40_000
    logits[::7] = -torch.inf
    index = torch.arange(count)
    uniform = sampler.uniforms(5, index % 3, index // 3, index * 0, 2)
    assert uniform.min() >= 0 and uniform.max() < 1
    share = logits.softmax(0)
    for column in range(2):
        tokens, logprobs = sampler.sample(logits.expand(count, size).clone(), uniform[:, column])
        close(logprobs, share.log()[tokens], 1e-5)
        found, expected = torch.bincount(tokens, minlength=size).float(), share * count
        assert not found[expected == 0].any()
        likely = expected > 5
        statistic = ((found - expected)[likely] ** 2 / expected[likely]).sum()
        assert abs(statistic - likely.sum()) < 5 * (2 * likely.sum()) ** 0.5
    assert abs(torch.corrcoef(uniform.T)[0, 1]) < 0.03
    edges = torch.tensor([0.0, 1 - 2**-24])
    tokens, _ = sampler.sample(logits.expand(2, size).clone(), edges)
    assert (share[tokens] > 0).all()
