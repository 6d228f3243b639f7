"""Coherence, attacks and the anti-theater report: hand-made thoughts with known scores. The cheats: test_cheats.py."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import problems, tiny_quiet_star
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qs_lib.champion import build_tokenizer
from qs_lib.data.batches import answer_batch, difficult_positions, thought_length
from qs_lib.data.tokens import THINKING_TOKENS, thinking_ids
from qs_lib.evaluation import theater as t
from qs_lib.evaluation.attacks import attacked_thoughts
from qs_lib.evaluation.coherence import Scale, coherence, consensus_gain, number_coverage
from qs_lib.evaluation.episodes import by_problem
from qs_lib.evaluation.verdict import judged
from qs_lib.stats import correlation
from qs_lib.workbook import figures, tables


def test_consensus_gain_by_hand():
    base = torch.tensor([0.5, 0.5]).log()
    after = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]).log()
    said = after.argmax(-1)  # what each thought leads to: 0, 0, 1
    gain = consensus_gain(after[:, said] - base[said])
    assert gain[0].item() == pytest.approx((math.log(0.9 / 0.5) + math.log(0.1 / 0.5)) / 2)
    assert gain[2].item() == pytest.approx(math.log(0.1 / 0.5))
    assert gain.argmin() == 2  # the dissenter is least coherent
    assert consensus_gain(torch.ones(1, 1)).tolist() == [0.0]


def test_scores_are_in_range_label_free_and_scaled():
    model, tokenizer = tiny_quiet_star()
    ids, mask, positions = answer_batch(tokenizer, problems(size=8))
    thoughts = model.think(ids, mask, positions, torch.Generator().manual_seed(0))
    gains = torch.randn(8, 1, 3, 3)
    first = coherence(tokenizer, ids, thoughts, gains, attention_mask=mask)
    changed = ids.clone()
    for row, at in enumerate(positions[:, 0]):
        changed[row, at + 1 :] = 5  # the label and all that follows
    again = coherence(tokenizer, changed, thoughts, gains, attention_mask=mask)
    scale = Scale.fit(first.raw)
    scaled = coherence(tokenizer, ids, thoughts, gains, scale, mask)
    for name in ("semantic", "syntactic", "predictive", "composite"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert (getattr(scaled, name) >= 0).all() and (getattr(scaled, name) <= 1).all()
    mixed = 0.4 * scaled.semantic + 0.3 * scaled.syntactic + 0.3 * scaled.predictive
    assert torch.allclose(scaled.composite, mixed)


QUESTION = "ben has 16 pens and 1,200 pins . ben finds 8 . how many ?"


def thoughts_of(tokenizer, *texts):
    """Hand-made thoughts after QUESTION, one row and position: (input_ids, thoughts)."""
    ids, width = torch.tensor([tokenizer.encode(QUESTION)]), 40
    tokens = torch.full((1, 1, len(texts), width), thinking_ids(tokenizer)[1])
    lengths = torch.zeros(1, 1, len(texts), dtype=torch.long)
    for k, text in enumerate(texts):
        row = tokenizer.encode(f"<think>{text}</think>", add_special_tokens=False)
        tokens[0, 0, k, : len(row)], lengths[0, 0, k] = torch.tensor(row), len(row)
    return ids, SimpleNamespace(tokens=tokens, lengths=lengths, positions=torch.tensor([[ids.shape[1] - 1]]))


def bpe(digits):
    """A byte-level tokenizer: digits one by one (as ours), or in pieces as it learnt them, spaces inside (as GPT-2)."""
    corpus = ["ben has 16 pens 1,200 pins finds 8 how many 16 + 8 = 24 think work out done answer step " * 3] * 5
    tokenizer = build_tokenizer("bpe", corpus, vocab_size=330)
    if not digits:
        plain = Tokenizer(models.BPE())
        plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        plain.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_tokens([AddedToken(t, special=True) for t in THINKING_TOKENS])
    return tokenizer


@pytest.mark.parametrize("digits", [True, False])
def test_number_coverage_reads_numbers_however_they_are_spelt(digits):
    tokenizer = bpe(digits)
    ids, thoughts = thoughts_of(
        tokenizer, " 16 + 8 = 24", "16+8<step>8", "<step> 1 and 6 and 12 and 80", " 1200 , 16 , 8", ""
    )
    if not digits:
        assert len(tokenizer.encode(" 16")) < len(tokenizer.encode("16")) and len(tokenizer.encode(" 1,200")) > 1
    got = number_coverage(tokenizer, ids, thoughts)[0, 0]
    assert got.tolist() == pytest.approx([2 / 3, 2 / 3, 0, 1, 0])


def test_number_coverage_of_padded_empty_and_wordy_texts():
    tokenizer = bpe(True)
    ids, thoughts = thoughts_of(tokenizer, " ben finds 8 pens")
    padded = torch.cat([torch.full((1, 3), tokenizer.pad_token_id), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    thoughts.positions += 3
    assert number_coverage(tokenizer, padded, thoughts, mask).item() == pytest.approx(1 / 3)
    thoughts.positions[:] = 3 + len(tokenizer.encode("ben has")) - 1  # no number read so far: words count
    assert number_coverage(tokenizer, padded, thoughts, mask).item() == 0.5
    thoughts.positions[:] = -1
    assert number_coverage(tokenizer, padded, thoughts, mask).item() == 0.0


def test_number_coverage_does_not_read_the_vocabulary(monkeypatch):
    tokenizer = bpe(True)
    ids, thoughts = thoughts_of(tokenizer, " 16 + 8")
    for name in ("convert_ids_to_tokens", "get_vocab"):  # 150,000 entries on a large model, at every call
        monkeypatch.setattr(tokenizer, name, None)
    assert number_coverage(tokenizer, ids, thoughts).item() == pytest.approx(2 / 3)


def test_a_single_thought_is_scored_too():
    model, tokenizer = tiny_quiet_star(num_thoughts=1)
    scale = t.fit_scale(model, tokenizer, problems(size=6), num_thoughts=1, thought_length=8)
    report = t.anti_theater(model, tokenizer, problems("test", 6), scale, num_thoughts=1, thought_length=8)
    assert {r["coherence"]["predictive"] for r in report.table} == {0.5}
    assert report.diversity == report.within_r == (0.0, 0.0, 0.0)


def test_every_thought_and_answer_of_the_report_is_there():
    model, tokenizer = tiny_quiet_star()
    report = t.anti_theater(
        model,
        tokenizer,
        problems("test", 6),
        num_thoughts=3,
        thought_length=8,
        before=model,
        training=[],
        weights="thoughts",
    )
    outside = {"control_gain", "reader_gain", "number_words"}  # models that are not given, words it cannot spell
    assert [c.id for c in report.checks] == [i for i in t.CHECKS if i not in outside]
    assert report.check("training_gain").value == 0 and report.check("redrawn").value == 1
    assert len(report.table) == 18 and len(report.episodes) == 6
    assert all(r["weight"] == pytest.approx(1 / 3) for r in report.table)  # alike, not by the shut head
    assert set(report.reliability) == {"weight", "vote", "coherence"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_tables_say_what_the_reports_say():
    model, tokenizer = tiny_quiet_star()
    settings = {"num_thoughts": 3, "thought_length": 8, "weights": "thoughts"}
    first = t.anti_theater(model, tokenizer, problems("test", 6), **settings)
    second = t.anti_theater(model, tokenizer, problems("test", 6), before=model, training=["how ?"], **settings)
    shown = tables.verdicts({"second": second, "first": first})
    made = [i for i in t.CHECKS if i not in ("control_gain", "reader_gain", "number_words")]
    assert list(shown.index) == made and shown.loc["training_gain", "first"] == "not made"
    assert shown.loc["training_gain", "second"] == "0.000 [-0.500, 0.500] open"
    assert shown.loc["moved", "second"] == "0.000 [0.000, 0.000] not reached"
    assert shown.loc["training_overlap", "second"] == "0.000 [0.000, 0.000] reached"
    added = tables.stages({"first": first, "second": second})
    assert added.loc["gain over the stage before"].tolist() == ["-", "0.000 [-0.500, 0.500]"]
    assert added.loc["checks reached", "second"] == f"{19 - len(second.missed)} of 19"
    assert tables.turned_red(second, first) == []  # what `first` was not asked, it did not pass
    honest = replace(first, checks=[replace(c, reached=True) for c in second.checks])
    assert tables.turned_red(second, honest) == second.missed
    r = correlation(by_problem(second.table, "predictive"), by_problem(second.table, "utility"))[0]
    assert tables.coherence_parts(second).loc["predictive", "pooled r"].startswith(f"{r:+.3f}")
    assert len(tables.reliabilities({"first": first, "second": second})) == 6
    numbers = tables.theater_summary(second)
    assert numbers["checks"] == 19 and numbers["redrawn_low"] == 1.0 and "vote_calibration_error_high" in numbers
    assert figures.calibration(second.reliability).axes[1].get_xlabel() == "vote (0 to 1)"


def test_too_few_problems_leave_a_check_open_and_do_not_prove_theater():
    checks = [
        judged("divergence", (0.9, 0.8, 1.0)),
        judged("training_gain", (0.04, -0.04, 0.1)),
    ]
    report = t.TheaterReport(checks, {}, {}, *[(0.0, 0.0, 0.0)] * 3, {}, [], [])
    assert not report.passed and report.verdict.startswith("NOT SHOWN, too few problems to tell: training_gain (the ")
    checks[1] = judged("training_gain", np.zeros(60))  # not one problem differs: 3 in 60 may
    assert (checks[1].low, checks[1].high) == (-0.05, 0.05) and report.verdict.startswith("NOT SHOWN")
    checks[1] = judged("training_gain", (-0.2, -0.3, -0.1))
    assert report.verdict.startswith("THEATER, caught by training_gain (the model before training answers as well")
    checks[1] = judged("training_gain", (0.04, 0.01, 0.1))
    assert report.passed and report.verdict.startswith("NOT THEATER: every check was passed; not made: ablation_gain")
    with pytest.raises(KeyError):
        report.check("redrawn")


def test_attacks_leave_tags_and_change_what_they_say():
    _, tokenizer = tiny_quiet_star()
    asked = problems(size=6)
    words = "<think> <step> 9 + 8 = 17 <step> 17 - 4 = 13 </think>".split()
    tokens = torch.tensor(tokenizer.convert_tokens_to_ids(words)).expand(6, 2, -1).clone()
    tokens[:, :, 2] = torch.arange(12).view(6, 2) + 4
    lengths = torch.full((6, 2), len(words))
    rng = np.random.default_rng(0)
    shuffled, _ = attacked_thoughts("shuffled", tokens, lengths, asked, tokenizer, rng)
    assert (shuffled[:, :, 0] == tokens[:, :, 0]).all() and (shuffled[:, :, -1] == tokens[:, :, -1]).all()
    assert all(sorted(a) == sorted(b) for a, b in zip(shuffled[0].tolist(), tokens[0].tolist(), strict=True))
    assert not torch.equal(shuffled, tokens)
    filler, _ = attacked_thoughts("filler", tokens, lengths, asked, tokenizer, rng)
    assert set(filler[:, :, 1:-1].flatten().tolist()) == {thinking_ids(tokenizer)[2]}
    foreign, _ = attacked_thoughts("foreign", tokens, lengths, asked, tokenizer, rng)
    assert all((foreign[i] != tokens[i]).any() for i in range(6))
    cut, ends = attacked_thoughts("last_step_deleted", tokens, lengths, asked, tokenizer, rng)
    assert (ends == 8).all() and (cut[:, :, 7] == tokens[:, :, -1]).all()
    own, _ = attacked_thoughts("own", tokens, lengths, asked, tokenizer, rng)
    assert torch.equal(own, tokens)


def test_one_problem_is_not_enough():
    model, tokenizer = tiny_quiet_star()
    with pytest.raises(ValueError, match="at least two held-out problems"):
        t.anti_theater(model, tokenizer, problems(size=1))


def test_a_misspelt_setting_is_refused():
    model, tokenizer = tiny_quiet_star()
    with pytest.raises(ValueError, match="unknown parameter 'num_thought'; did you mean num_thoughts"):
        t.anti_theater(model, tokenizer, problems(size=2), num_thought=3)


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
