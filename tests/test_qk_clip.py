"""QK-Clip against logits computed here from the layers' inputs, family by family."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    BloomPreTrainedModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qs_lib.training.optim import MuonGrokfast
from qs_lib.training.qk_clip import clip_heads, watch_max_logits

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama MHA": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)),
    "llama GQA": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "llama bias": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
}


def build(family):
    """The model, with weights and biases large enough that its heads differ."""
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn")):
                p.normal_(std=0.5)
    return model


def attention_inputs(model, **batch):
    """(module, hidden states, (cos, sin) or None) of every attention layer in one forward pass."""
    seen, hooks = [], []

    def keep(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((module, hidden.detach(), kwargs.get("position_embeddings")))

    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def scores(module, hidden, rotary):
    """q.k / sqrt(d), (batch, heads, query, key), straight from the definition."""
    d = module.head_dim
    if rotary is None:
        q, k, _ = (hidden @ module.c_attn.weight + module.c_attn.bias).chunk(3, dim=-1)
    else:
        q, k = module.q_proj(hidden), module.k_proj(hidden)
    q, k = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (q, k))
    if rotary is not None:
        cos, sin = (x.unsqueeze(1) for x in rotary)
        q, k = (x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin for x in (q, k))
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / d**0.5


def largest(logits, attention_mask):
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool).tril() & attention_mask[:, None, None, :].bool()
    return logits.masked_fill(~allowed, -torch.inf).amax(dim=(0, 2, 3))


def batch_of(padding):
    ids = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = 0
    if padding == "right":
        mask[1, -4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_watch_sees_the_largest_allowed_logit_of_each_head(family, padding):
    model, batch = build(family), batch_of(padding)
    plain = model(**batch).logits
    with watch_max_logits(model) as watch:
        watched = model(**batch).logits
    assert torch.equal(watched, plain)
    assert model.config._attn_implementation == "sdpa"
    for module, hidden, rotary in attention_inputs(model, **batch):
        expected = largest(scores(module, hidden, rotary), batch["attention_mask"])
        torch.testing.assert_close(watch.max_logits[module.layer_idx], expected, rtol=1e-5, atol=1e-5)
    assert sorted(watch.max_logits) == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_clip_brings_the_heads_above_to_the_threshold_and_leaves_the_others_bit_equal(family):
    model, batch = build(family), batch_of("left")
    with watch_max_logits(model) as watch:
        model(**batch)
    inputs = attention_inputs(model, **batch)
    before = [scores(*layer) for layer in inputs]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    threshold = torch.cat(list(watch.max_logits.values())).median().item()  # some heads above it, some not
    report = clip_heads(watch, threshold)

    above = 0
    for layer, old in zip(inputs, before, strict=True):
        new = scores(*layer)
        for head, top in enumerate(largest(old, batch["attention_mask"]).tolist()):
            if top > threshold * (1 + 1e-5):
                above += 1
                torch.testing.assert_close(new[:, head], old[:, head] * (threshold / top), rtol=1e-4, atol=1e-4)
                assert largest(new, batch["attention_mask"])[head].item() == pytest.approx(threshold, rel=1e-5)
            else:
                assert torch.equal(new[:, head], old[:, head])
    assert 0 < above < 8
    assert len(report.heads) == above and report.report_only == {}
    assert report.max_logit == pytest.approx(max(m.max().item() for m in watch.max_logits.values()))
    for name, p in model.named_parameters():  # values, outputs and everything else stay
        if not any(part in name for part in ("q_proj", "k_proj", "c_attn")):
            assert torch.equal(p, weights[name]), name
        if "c_attn" in name:
            assert torch.equal(p[..., 64:], weights[name][..., 64:])


def test_one_factor_per_group_would_be_noticed():
    """The published shortcut for grouped queries (the group's smallest factor on all) clips innocent heads."""
    model, batch = build("llama GQA"), batch_of("none")
    with watch_max_logits(model) as watch:
        model(**batch)
    tops = watch.max_logits[0].view(2, 2)
    group = int((tops[:, 0] - tops[:, 1]).abs().argmax())
    threshold = tops[group].mean().item()
    module, hidden, rotary = attention_inputs(model, **batch)[0]
    innocent = 2 * group + int(tops[group].argmin())
    old = scores(module, hidden, rotary)[:, innocent]
    clip_heads(watch, threshold)
    assert torch.equal(scores(module, hidden, rotary)[:, innocent], old)
    with torch.no_grad():
        module.k_proj.weight[group * 8 : (group + 1) * 8] *= threshold / tops[group].max()
    assert not torch.equal(scores(module, hidden, rotary)[:, innocent], old)


def test_nothing_changes_below_the_threshold():
    model, batch = build("qwen2"), batch_of("none")
    weights = [p.clone() for p in model.parameters()]
    with watch_max_logits(model) as watch:
        model(**batch)
    report = clip_heads(watch, 1e6)
    assert report.heads == [] and 0 < report.max_logit < 1e6
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_maxima_of_other_processes_count(monkeypatch):
    model, batch = build("llama MHA"), batch_of("none")
    with watch_max_logits(model) as watch:
        model(**batch)
    own = {layer: tops.clone() for layer, tops in watch.max_logits.items()}
    threshold = 2 * max(tops.max().item() for tops in own.values())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tops, op: tops[1:2].clamp_(min=4 * threshold))
    old = model.model.layers[0].self_attn.q_proj.weight.clone()
    report = clip_heads(watch, threshold)
    assert [(layer, head) for layer, head, _ in report.heads] == [(0, 1), (1, 1)]
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight[8:16], old[8:16] / 2)


def lora_model(family):
    peft = pytest.importorskip("peft")
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "k_proj"]
    return peft.get_peft_model(FAMILIES[family](), peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)), "normalised"),
        (lambda: Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=2)), "no separate"),
        (lambda: lora_model("llama MHA"), "adapter"),
        (lambda: lora_model("gpt2"), "adapter"),
    ],
)
def test_report_only_changes_no_weight(make, reason):
    model = make()
    weights = [p.clone() for p in model.parameters()]
    with watch_max_logits(model) as watch:
        model(input_ids=batch_of("none")["input_ids"])
    report = clip_heads(watch, 1e-6)
    assert len(report.heads) > 0
    assert sorted(report.report_only) == [0, 1] and reason in report.report_only[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_families_that_bypass_the_interface_are_refused(monkeypatch):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(RuntimeError, match="cannot run with sdpa"), watch_max_logits(bloom):
        pass
    monkeypatch.setattr(BloomPreTrainedModel, "_supports_sdpa", True)  # even if it claimed it could
    with pytest.raises(RuntimeError, match="0 of 2 attention layers"), watch_max_logits(bloom):
        pass
    gemma2 = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    with pytest.raises(RuntimeError, match="cannot run with sdpa"), watch_max_logits(gemma2):
        pass


def test_watch_gives_everything_back_after_an_error():
    model = build("llama MHA")
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    with pytest.raises(KeyError), watch_max_logits(model):
        assert torch.initial_seed() == 0
        drawn = torch.rand(3)
        with pytest.raises(RuntimeError, match="already"), watch_max_logits(model):
            pass
        raise KeyError
    assert model.config._attn_implementation == "eager"
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)  # the trial pass took no random numbers
    with watch_max_logits(model) as watch:
        assert watch.max_logits == {}


def test_watch_ignores_another_model_of_the_same_config():
    model = build("llama MHA")
    other = LlamaForCausalLM(model.config)
    with watch_max_logits(model) as watch:
        other(**batch_of("none"))
    assert watch.max_logits == {}


def test_maxima_run_over_calls_and_long_sequences():
    model = build("llama GQA")
    ids = torch.randint(1, 50, (1, 300), generator=torch.Generator().manual_seed(1))  # more than one block of rows
    with watch_max_logits(model) as watch, torch.no_grad():
        model(input_ids=ids[:, :20])
        short = watch.max_logits[0].clone()
        model(input_ids=ids)
    inputs = attention_inputs(model, input_ids=ids)
    expected = largest(scores(*inputs[0]), torch.ones_like(ids))
    torch.testing.assert_close(watch.max_logits[0], torch.maximum(expected, short))


def test_optimizer_clips_after_its_step():
    model, batch = build("llama GQA"), batch_of("none")
    threshold = 5.0
    optimizer = MuonGrokfast(model, muon_lr=1e-3, adamw_lr=1e-4, grokfast_lambda=0.1, qk_clip_threshold=threshold)
    before = [p.clone() for p in model.parameters()]

    def backward():
        model(**batch, labels=batch["input_ids"]).loss.backward()

    backward()
    with pytest.raises(RuntimeError, match="no attention logits were seen"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    with watch_max_logits(model) as optimizer.watch:
        backward()
        optimizer.step()
        first = optimizer.clip_report
        backward()
        optimizer.step()
    assert first.max_logit > 1.5 * threshold
    assert optimizer.clip_report.max_logit < 1.2 * threshold
