"""An adapter's layers give peft's own numbers, gradients included, without its copies."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_lm

peft = pytest.importorskip("peft")

from qs_lib.data.tokens import thinking_ids
from qs_lib.files import REPOSITORY
from qs_lib.thoughts.generate import generate_thoughts
from qs_lib.training import adapter, loop
from qs_lib.training.settings import BakingSettings


def adapted(monkeypatch, fast, architecture="llama", tied=True):
    model, tokenizer = tiny_lm(architecture)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with monkeypatch.context() as patch:
        if not fast:
            patch.setattr(adapter, "hasten", lambda model: model)
        model = loop.add_adapter(model, tokenizer, rank=2).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model, tokenizer


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("bf16", [False, True])
def test_logits_and_gradients_are_those_of_pefts_own_layers(monkeypatch, architecture, tied, bf16):
    found = []
    for fast in (False, True):
        model, tokenizer = adapted(monkeypatch, fast, architecture, tied)
        kinds = {type(module) for module in model.modules()}
        assert (adapter.TokenRows in kinds) == fast and (adapter.LoraLinear in kinds) == fast
        ids = torch.tensor([[5, *thinking_ids(tokenizer), 9, 11], [7, 6, 5, *thinking_ids(tokenizer)]])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids).logits
        logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        with model.disable_adapter():
            bare = model(ids).logits
        found.append((logits, grads, bare, model.merge_and_unload()(ids).logits))
    (logits, grads, bare, merged), (fast_logits, fast_grads, fast_bare, fast_merged) = found
    close = {"atol": 0.05, "rtol": 0.05} if bf16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(fast_logits, logits, **close)
    torch.testing.assert_close(fast_grads, grads, **close)
    assert torch.equal(fast_bare, bare) and torch.equal(fast_merged, merged)
    assert all(grad.abs().sum() > 0 for grad in grads.values())


def test_the_same_seed_draws_the_same_thoughts(monkeypatch):
    drawn = []
    for fast in (False, True):
        model, _ = adapted(monkeypatch, fast)
        seed = torch.Generator().manual_seed(3)
        drawn.append(generate_thoughts(model, torch.arange(4, 16)[None], thought_length=8, generator=seed))
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    torch.testing.assert_close(drawn[0].logprobs, drawn[1].logprobs)


def test_the_rows_of_the_vocabulary_are_not_copied(monkeypatch):
    model, _ = adapted(monkeypatch, True)
    whole = list(model.get_base_model().get_input_embeddings().weight.shape)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        model(torch.arange(4, 16)[None]).logits.logsumexp(-1).sum().backward()
    assert not [e.name for e in profile.function_events if "copy" in e.name and whole in e.input_shapes]


def test_the_benchmark_of_an_adapter_runs():
    """It calls inner parts of the trainings by name, so a change there would break it unseen."""
    command = [sys.executable, str(REPOSITORY / "tests" / "benchmarks" / "bench_adapter.py"), "pocket"]
    command += ["--problems", "1", "--thoughts", "2", "--repeats", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-800:]
    assert "one step of reinforcement" in done.stdout


def test_an_adapter_begins_as_its_seed_says():
    def begun(seed: int, drawn: int):
        torch.manual_seed(drawn)  # what was drawn before, by an evaluation, say
        model, tokenizer = tiny_lm()
        torch.rand(drawn)
        with loop.training(model, tokenizer, BakingSettings(lora_rank=2, seed=seed)) as trained:
            return torch.cat([p.detach().flatten() for name, p in trained.named_parameters() if "lora_A" in name])

    first = begun(0, 1)
    assert torch.equal(first, begun(0, 2)) and not torch.equal(first, begun(1, 1))
