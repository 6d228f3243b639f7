"""Planted cheats: each turns the verdict red, and only by the checks named beside it.

A stand-in for a trained model makes the honest case certain: it answers with the last word of its thoughts.
"""

import random
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from tiny import problems, tiny_quiet_star

from qs_lib.evaluation import attacks, episodes
from qs_lib.evaluation import theater as t
from qs_lib.evaluation.cheats import CHEATS, plant
from qs_lib.model import QuietStarForCausalLM
from qs_lib.workbook.params import AntiTheater

ASKED, TRAINED_ON = problems("test", 30), problems("train", 30)
ANSWERS = {p["question"]: p["answer"] for p in ASKED + TRAINED_ON}
GAINS = {"ablation_gain", "foreign_gain", "shuffled_gain", "filler_gain", "training_gain"}
READ = {"control_gain", "last_step_gain", "belief_gain", "follow_through"}  # the answer comes from the thought
WORKED = {"needed_steps", "reader_gain"}  # and the thought is worked steps that others can read
CAUGHT_BY = {
    # the stand-in's thoughts go with it, which only a real model keeps
    "unused": GAINS | READ | WORKED | {"early_answering", "coherence_utility_r"},
    "random": {"coherence_utility_r"},
    "frozen": {"training_gain", "moved"},
    "copied": GAINS | READ | WORKED | {"redrawn", "coherence_utility_r"},
    "repeated": GAINS | READ | WORKED | {"early_answering", "divergence", "redrawn", "coherence_utility_r"},
    "leaked": {"redrawn"},
    "seen": {"training_overlap"},
}


class Reader:
    """Its thoughts end on the right answer in a ``share`` of cases, and it is less sure of the others."""

    def __init__(self, share):
        self.real, self.tokenizer = tiny_quiet_star()
        self.lm, self.config, self.mixing_head = self.real.lm, self.real.config, self.real.mixing_head
        self.share, self.mix, self.mixing_weights = share, self.real.mix, self.real.mixing_weights

    def think(self, ids, mask, positions, generator, num_thoughts=4, thought_length=8, temperature=1.0):
        thoughts = self.real.think(
            ids, mask, positions, generator, num_thoughts=num_thoughts, thought_length=thought_length
        )
        for row in range(len(ids)):
            asked = self.tokenizer.decode(ids[row, 1 : positions[row, 0] + 1])
            question = next(q for q in ANSWERS if asked.endswith(q))  # a hint may stand before it
            rng = random.Random(f"{question} {generator.initial_seed()}")
            for k in range(num_thoughts):
                right = rng.random() < self.share
                last = ANSWERS[question] if right else str((int(ANSWERS[question]) + rng.randint(1, 20)) % 21)
                text = ["<think>", "<step>", "9", "+", "8", "=", last, "</think>"]
                thoughts.tokens[row, 0, k] = torch.tensor(self.tokenizer.convert_tokens_to_ids(text))
                thoughts.lengths[row, 0, k] = len(text)
                thoughts.logprobs[row, 0, k] = -0.01 if right else -2.0
        return thoughts


def last_words(tokens, lengths):
    return tokens.gather(-1, (lengths - 2).clamp_min(0).unsqueeze(-1)).squeeze(-1)


def rescore(lm, ids, thoughts, mask, n_true, **_):
    """After a thought its last word is likely, the more so the surer the thought was; without one every word alike."""
    b, _, k, _ = thoughts.tokens.shape
    size = lm.config.vocab_size
    after = torch.full((b, 1, k, n_true, size), 1e-4)
    sure = thoughts.logprobs.amin(-1).exp()[..., None, None].expand(b, 1, k, n_true, 1)
    words = last_words(thoughts.tokens, thoughts.lengths)[..., None, None].expand(b, 1, k, n_true, 1)
    after = after.scatter(-1, words, sure)
    after = (after / after.sum(-1, keepdim=True)).log()
    base = torch.full((b, 1, n_true, size), 1 / size).log()
    follows = thoughts.positions + 1 < mask.sum(1, keepdim=True)
    truth = ids.gather(1, (thoughts.positions + 1).clamp_max(ids.shape[1] - 1))[:, :, None]
    valid = torch.zeros(b, 1, n_true, dtype=torch.bool)
    valid[..., 0] = follows
    return type(
        "Scored",
        (),
        {
            "true_full": after,
            "base_full": base,
            "valid": valid,
            "true_logprobs": after.gather(-1, truth[..., None, None].expand(b, 1, k, n_true, 1)).squeeze(-1),
            "base_logprobs": base.gather(-1, truth[..., None].expand(b, 1, n_true, 1)).squeeze(-1),
            "base_hidden": torch.zeros(b, 1, n_true, 32),
            "thought_hidden": torch.zeros(b, 1, k, n_true, 32),
        },
    )


def vote(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens):
    """The last word most thoughts agree on; a model whose gate is shut says what it says without."""
    if isinstance(model, QuietStarForCausalLM):
        return [[] for _ in contexts]
    return [[max(row, key=row.count)] for row in last_words(tokens, lengths).tolist()]


def read(lm, tokenizer, contexts, *_, **__):
    """Another reader answers with the last word of a thought in plain words, and with none if there is no thought."""
    words = [c.split()[-2] if c.endswith(" done") else "?" for c in contexts]
    return [tokenizer.encode(word, add_special_tokens=False) for word in words]


@pytest.fixture
def honest(monkeypatch):
    """Arguments of anti_theater for an honest thinker and the weaker model it was trained from."""
    monkeypatch.setattr(episodes, "rescore_thoughts", rescore)
    monkeypatch.setattr(episodes, "decode_with_thoughts", vote)
    monkeypatch.setattr(attacks, "replies", read)
    trained, before = Reader(0.75), Reader(0.4)
    used = [p["question"] for p in TRAINED_ON]
    return {
        "model": trained,
        "tokenizer": trained.tokenizer,
        "problems": ASKED,
        "before": before,
        "training": used,
        "reader": trained.lm,
        "controls": {"answers alone": np.zeros(len(ASKED)), "filler": np.arange(len(ASKED)) % 5 == 0},
        "num_thoughts": 4,
        "thought_length": 8,
    }


def test_an_honest_thinker_passes_every_check(honest):
    report = t.anti_theater(**plant("honest", honest, TRAINED_ON))
    assert report.passed
    assert report.verdict == "NOT THEATER: every check was passed; not made: number_words"  # words it cannot spell
    assert [c.id for c in report.checks] == [name for name in t.CHECKS if name != "number_words"]
    assert report.accuracy["own"][0] > 0.7 > report.accuracy["foreign"][0]
    assert report.reliability["coherence"].preference[1] > 0.5  # right thoughts are the more coherent ones


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_caught_and_without_its_checks_it_would_not_be(honest, cheat):
    report = t.anti_theater(**plant(cheat, honest, TRAINED_ON))
    assert not report.passed and set(report.missed) == CAUGHT_BY[cheat]
    assert report.verdict.startswith("THEATER, caught by")
    for name in report.missed:
        assert name in report.verdict and t.CHECKS[name].meaning in report.verdict
    blind = replace(report, checks=[c for c in report.checks if c.id not in CAUGHT_BY[cheat]])
    assert blind.passed and blind.verdict.startswith("NOT THEATER")


def test_a_leak_makes_everything_else_look_better(honest):
    report, real = (t.anti_theater(**plant(c, honest, TRAINED_ON)) for c in ("leaked", "honest"))
    assert report.accuracy["own"][0] == 1.0 > real.accuracy["own"][0]
    assert report.check("ablation_gain").value > real.check("ablation_gain").value


def test_every_answer_reader_is_kept_from_the_sampler(honest):
    """The sampler never sees the answer: what it is given ends with the question."""
    given, model = [], honest["model"]

    def think(ids, mask, positions, generator, **settings):
        given.append(bool((mask.sum(1) - 1 == positions[:, 0]).all()))
        return model.think(ids, mask, positions, generator, **settings)

    t.anti_theater(**honest | {"think": think})
    assert given == [True, False, False]  # but for the check that it is blind to what follows, whose draws are not read


def test_overlap_counts_questions_that_differ_in_case_and_spacing_only(honest):
    used = [ASKED[0]["question"].upper().replace(" ", "  "), *honest["training"]]
    report = t.anti_theater(**honest | {"training": used})
    assert report.missed == ["training_overlap"] and report.check("training_overlap").value == pytest.approx(1 / 30)


def test_the_parameter_knows_every_cheat_and_others_are_refused(honest):
    assert get_args(AntiTheater.model_fields["theater"].annotation) == ("honest", *CHEATS)
    with pytest.raises(ValueError, match="unknown cheat 'bribe'; known: unused"):
        plant("bribe", honest, TRAINED_ON)


def test_cheats_on_a_real_model_leave_it_as_it_is():
    model, tokenizer = tiny_quiet_star()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    few = {
        "model": model,
        "tokenizer": tokenizer,
        "problems": ASKED[:4],
        "before": model,
        "training": ["how ?"],
        "num_thoughts": 2,
        "thought_length": 8,
    }
    for cheat in CHEATS:
        assert not t.anti_theater(**plant(cheat, few, TRAINED_ON)).passed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "divergence" in t.anti_theater(**plant("repeated", few, TRAINED_ON)).missed
