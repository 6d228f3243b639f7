"""Coherence and anti-theater: hand-made thoughts with known scores, and planted cheats that must turn the verdict red."""

import numpy as np
import pytest
import torch
from tiny import problems, tiny_quiet_star

from qs_lib import theater as t
from qs_lib.coherence import Coherence, Scale, coherence, consensus_gain, number_coverage
from qs_lib.positions import difficult_positions, thought_length
from qs_lib.reinforce import answer_batch
from qs_lib.tokens import thinking_ids


def test_consensus_gain_by_hand():
    base = torch.tensor([0.5, 0.5]).log()
    after = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]).log()
    gain = consensus_gain(after, base)
    others = (after[1].exp() + after[2].exp()) / 2
    assert gain[0].item() == pytest.approx((others * (after[0] - base)).sum().item())
    assert gain.argmax() == 1 and gain.argmin() == 2  # the dissenter is least coherent
    assert consensus_gain(after[:1], base).tolist() == [0.0]


def test_scores_are_in_range_label_free_and_scaled():
    model, tokenizer = tiny_quiet_star()
    ids, mask, positions = answer_batch(tokenizer, problems(size=8))
    thoughts = model.think(ids, mask, positions, torch.Generator().manual_seed(0))
    after = torch.randn(8, 1, 3, 50).log_softmax(-1)
    base = torch.randn(8, 1, 50).log_softmax(-1)
    first = coherence(tokenizer, ids, thoughts, after, base, attention_mask=mask)
    changed = ids.clone()
    for row, at in enumerate(positions[:, 0]):
        changed[row, at + 1 :] = 5  # the label and all that follows
    again = coherence(tokenizer, changed, thoughts, after, base, attention_mask=mask)
    scale = Scale.fit(first.raw)
    scaled = coherence(tokenizer, ids, thoughts, after, base, scale, mask)
    for name in ("semantic", "syntactic", "predictive", "composite"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert (getattr(scaled, name) >= 0).all() and (getattr(scaled, name) <= 1).all()
    mixed = 0.4 * scaled.semantic + 0.3 * scaled.syntactic + 0.3 * scaled.predictive
    assert torch.allclose(scaled.composite, mixed)


def test_number_coverage_by_hand():
    model, tokenizer = tiny_quiet_star(num_thoughts=1)
    ids = torch.tensor([tokenizer.encode("ben has 9 pens . ben finds 8 . how many ?")])
    thoughts = model.think(ids, None, torch.tensor([[ids.shape[1] - 1]]))
    words = "<think> <step> 9 + 7 = 16 </think>".split()
    thoughts.tokens[0, 0, 0, :8] = torch.tensor(tokenizer.convert_tokens_to_ids(words))
    thoughts.lengths[:] = 8
    assert number_coverage(tokenizer, ids, thoughts).item() == 0.5


def test_attacks_leave_tags_and_change_what_they_say():
    _, tokenizer = tiny_quiet_star()
    asked = problems(size=6)
    words = "<think> <step> 9 + 8 = 17 <step> 17 - 4 = 13 </think>".split()
    tokens = torch.tensor(tokenizer.convert_tokens_to_ids(words)).expand(6, 2, -1).clone()
    tokens[:, :, 2] = torch.arange(12).view(6, 2) + 4
    lengths = torch.full((6, 2), len(words))
    rng = np.random.default_rng(0)
    shuffled, _ = t.attacked_thoughts("shuffled", tokens, lengths, asked, tokenizer, rng)
    assert (shuffled[:, :, 0] == tokens[:, :, 0]).all() and (shuffled[:, :, -1] == tokens[:, :, -1]).all()
    assert all(sorted(a) == sorted(b) for a, b in zip(shuffled[0].tolist(), tokens[0].tolist(), strict=True))
    assert not torch.equal(shuffled, tokens)
    filler, _ = t.attacked_thoughts("filler", tokens, lengths, asked, tokenizer, rng)
    assert set(filler[:, :, 1:-1].flatten().tolist()) == {thinking_ids(tokenizer)[2]}
    foreign, _ = t.attacked_thoughts("foreign", tokens, lengths, asked, tokenizer, rng)
    assert all((foreign[i] != tokens[i]).any() for i in range(6))
    cut, ends = t.attacked_thoughts("last_step_deleted", tokens, lengths, asked, tokenizer, rng)
    assert (ends == 8).all() and (cut[:, :, 7] == tokens[:, :, -1]).all()
    own, _ = t.attacked_thoughts("own", tokens, lengths, asked, tokenizer, rng)
    assert torch.equal(own, tokens)


def test_correlation_recovers_a_known_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    r, low, high = t.correlation(x, 0.8 * x + 0.6 * rng.normal(size=x.shape))
    assert low < 0.8 < high and r == pytest.approx(0.8, abs=0.05)
    assert t.correlation(np.ones((5, 2)), rng.normal(size=(5, 2)))[0] == 0.0


def honest(monkeypatch, model, tokenizer, share=0.9):
    """A stand-in for a trained reader: it answers with the last word of a thought and knows nothing without one.

    Returns ``think``, whose thoughts end on the right answer ``share`` of the time."""
    asked, rng = problems("test", 30), np.random.default_rng(0)

    def think(ids, mask, positions, generator=None, num_thoughts=4, **_):
        thoughts = model.think.__func__(model, ids, mask, positions, generator, num_thoughts=num_thoughts, thought_length=8)
        words = {}
        for p in asked:
            words[p["question"]] = p["answer"]
        for row in range(len(ids)):
            question = tokenizer.decode(ids[row, 1 : positions[row, 0] + 1])
            for k in range(num_thoughts):
                last = words[question] if rng.random() < share else str(rng.integers(0, 21))
                text = ["<think>", "<step>", "9", "+", "8", "=", last, "</think>"]
                thoughts.tokens[row, 0, k] = torch.tensor(tokenizer.convert_tokens_to_ids(text))
                thoughts.lengths[row, 0, k] = 8
                thoughts.logprobs[row, 0, k] = -0.01 if last == words[question] else -2.0
        return thoughts

    def rescore(lm, ids, thoughts, mask, n_true, **_):
        b, _, k, _ = thoughts.tokens.shape
        size = len(tokenizer)
        after = torch.full((b, 1, k, n_true, size), 1e-4)
        for row in range(b):
            for i in range(k):
                after[row, 0, i, :, thoughts.tokens[row, 0, i, -2]] = 1.0
        after = (after / after.sum(-1, keepdim=True)).log()
        base = torch.full((b, 1, n_true, size), 1 / size).log()
        truth = ids.gather(1, thoughts.positions + 1)
        true = after[..., 0, :].gather(-1, truth[:, :, None, None].expand(-1, -1, k, 1)).expand(-1, -1, -1, n_true).clone()
        true[..., 1:] = 0
        plain = base[..., 0, :].gather(-1, truth[:, :, None]).expand(-1, -1, n_true).clone()
        plain[..., 1:] = 0
        return type("S", (), {"true_full": after, "base_full": base, "true_logprobs": true, "base_logprobs": plain,
                                  "valid": torch.ones(b, 1, n_true, dtype=torch.bool), "base_hidden": torch.zeros(b, 1, n_true, 32),
                                  "thought_hidden": torch.zeros(b, 1, k, n_true, 32)})  # fmt: skip

    def decode(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens):
        votes = [row[torch.arange(len(row)), (n - 2).clamp_min(0)].tolist() for row, n in zip(tokens, lengths, strict=True)]
        return [[max(v, key=v.count)] for v in votes]

    monkeypatch.setattr(t, "rescore_thoughts", rescore)
    monkeypatch.setattr(t, "decode_with_thoughts", decode)
    return asked, think


def caught(report):
    return {check.id for check in report.checks if not check.reached}


def test_an_honest_thinker_passes_and_every_cheat_is_caught(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    asked, think = honest(monkeypatch, model, tokenizer, share=0.7)
    report = t.anti_theater(model, tokenizer, asked, think=think)
    assert report.passed and report.verdict.startswith("NOT THEATER"), report.verdict
    assert report.accuracy["own"][0] > 0.6 > report.accuracy["foreign"][0]
    assert len(report.episodes) == 30 and len(report.table) == 120

    def random_scorer(*arguments):
        real = coherence(*arguments)
        return Coherence(*[torch.rand(real.composite.shape) for _ in range(4)], raw={})

    assert "coherence_utility_r" in caught(t.anti_theater(model, tokenizer, asked, think=think, score=random_scorer))

    _, useless = honest(monkeypatch, model, tokenizer, share=0.0)
    assert caught(t.anti_theater(model, tokenizer, asked, think=useless)) >= {"ablation_gain", "foreign_gain"}

    monkeypatch.setattr(t, "decode_with_thoughts", lambda *a: [[5] for _ in a[2]])  # thoughts are not used at all
    assert caught(t.anti_theater(model, tokenizer, asked, think=think)) >= {
        "ablation_gain", "foreign_gain", "shuffled_gain", "filler_gain"}  # fmt: skip


def test_a_thought_copied_from_the_direct_continuation_is_caught(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    asked = problems("test", 6)
    from qs_lib.evaluate import replies

    def copy(ids, mask, positions, generator=None, **settings):
        thoughts = model.think(ids, mask, positions, generator, num_thoughts=2, thought_length=8)
        for row in range(len(ids)):
            question = tokenizer.decode(ids[row, 1 : positions[row, 0] + 1])
            direct = replies(model.lm, tokenizer, [question], 6, tuple(thinking_ids(tokenizer)))[0]
            inner = direct[:6]
            thoughts.tokens[row, 0, :, 1 : len(inner) + 1] = torch.tensor(inner)
            thoughts.tokens[row, 0, :, len(inner) + 1] = model.config.end_think_token_id
            thoughts.lengths[row, 0] = len(inner) + 2
        return thoughts

    report = t.anti_theater(model, tokenizer, asked, think=copy, num_thoughts=2, thought_length=8)
    assert "divergence" in caught(report) and "repeat the direct continuation" in report.verdict


def test_one_problem_is_not_enough():
    model, tokenizer = tiny_quiet_star()
    with pytest.raises(ValueError, match="at least two held-out problems"):
        t.anti_theater(model, tokenizer, problems(size=1))


def test_difficult_positions_are_where_the_model_is_unsure():
    logits = torch.zeros(1, 5, 4)
    logits[0, :, 0] = torch.tensor([9.0, 0.0, 9.0, 1.0, 0.0])
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert difficult_positions(logits, ids, count=2).tolist() == [[1, 3]]
    ids[0, 3] = 2  # the true token after position 2 is one it rules out
    assert difficult_positions(logits, ids, count=1, by="log_prob").tolist() == [[2]]
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    assert difficult_positions(logits, ids, mask, count=3).tolist() == [[0, -1, -1]]
    with pytest.raises(ValueError, match="'entropy' or 'log_prob'"):
        difficult_positions(logits, ids, by="loss")
    assert [thought_length(n) for n in (5, 60, 400)] == [10, 12, 20]
