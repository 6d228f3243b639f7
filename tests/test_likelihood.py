import numpy as np
import pytest
import torch
from tiny import problems, tiny_quiet_star

from qs_lib.data.batches import text_of
from qs_lib.data.tokens import encode, thinking_ids
from qs_lib.evaluation import likelihood as li
from qs_lib.evaluation.likelihood import SHARPENINGS

TEXTS = [(p["question"], p["answer"] + " .") for p in problems(size=5)]


def scores(gate: float, **settings):
    """Of an untrained model whose head gives thoughts the whole weight (``gate`` 50) or none (0), and its thoughts."""
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, gate)
    drawn, think = [], model.think
    model.think = lambda *given, **more: drawn.append(think(*given, **more)) or drawn[-1]
    found = li.text_log_likelihood(
        model, tokenizer, TEXTS, positions=4, num_thoughts=2, thought_length=6, controls=True, **settings
    )
    return found, model, tokenizer, drawn[0]


def test_with_a_shut_gate_everything_is_the_plain_model():
    found, model, tokenizer, _ = scores(0.0)
    for name in ("with", "foreign", "filler"):
        assert np.allclose(found[name], found["without"], atol=1e-5, equal_nan=True)
    plainly = li.plain_log_likelihood(model, tokenizer, TEXTS, positions=4)
    assert np.allclose(plainly[SHARPENINGS.index(1.0)], found["without"], atol=1e-5, equal_nan=True)
    assert not np.allclose(found["alone"], found["without"], atol=1e-2, equal_nan=True)


def plain(model, ids: list[int], truth: int, sharpening: float = 1.0) -> float:
    logits = model.lm(torch.tensor([ids])).logits[0, -1] / sharpening
    logits[list(model.config.hidden_ids)] = -torch.inf
    return logits.log_softmax(-1)[truth].item()


@torch.no_grad()
def test_controls_again_from_plain_passes():
    """One text after another, read as text + what the control puts in place of each thought."""
    found, model, tokenizer, thoughts = scores(50.0)
    plainly = li.plain_log_likelihood(model, tokenizer, TEXTS, positions=4, batch_size=2)
    step, (k, places) = thinking_ids(tokenizer)[2], (2, range(4))
    for row, text in enumerate(TEXTS):
        ids = encode(tokenizer, *text).ids
        for p in places:
            at = thoughts.positions[row, p].item()
            read, truth = ids[: at + 1], ids[at + 1]
            expected = {"with": 0.0, "foreign": 0.0, "filler": 0.0}
            for j in range(k):
                own, other = (thoughts.tokens[r, p, j, : thoughts.lengths[r, p, j]].tolist() for r in (row, row - 1))
                given = {"with": own, "foreign": other, "filler": [own[0], *[step] * (len(own) - 2), own[-1]]}
                for name, thought in given.items():
                    expected[name] += np.exp(plain(model, read + thought, truth)) / k
            for name, value in expected.items():
                # the gate is open but not one: 1e-3 of the plain prediction is left at most
                assert found[name][row, p] == pytest.approx(np.log(value), abs=0.05), name
            for s, value in zip(SHARPENINGS, plainly[:, row, p], strict=True):
                assert value == pytest.approx(plain(model, read, truth, s), abs=1e-3)


def test_the_temperature_is_fitted_on_other_texts(monkeypatch):
    sharpened = np.full((len(SHARPENINGS), 2, 2), -3.0)
    validation, test, scores = sharpened.copy(), sharpened.copy(), {"with": np.ones((2, 2))}
    validation[2], test[5], test[2, 0, 0] = -1.0, 0.0, np.nan
    plain = {("test", 3): test, ("validation", 3): validation}
    monkeypatch.setattr(li, "plain_log_likelihood", lambda model, tokenizer, texts, positions: plain[texts, positions])
    monkeypatch.setattr(li, "text_log_likelihood", lambda *given, **settings: scores)
    found, best = li.controlled_log_likelihood(None, None, "test", "validation", positions=3)
    assert best == SHARPENINGS[2] and np.array_equal(found["temperature"], test[2], equal_nan=True)
    assert found["temperature"][1].tolist() == [-3.0, -3.0] and found["with"] is scores["with"]


def test_all_controls_are_measured_at_the_same_places():
    model, tokenizer = tiny_quiet_star()
    found, _ = li.controlled_log_likelihood(model, tokenizer, TEXTS, TEXTS[:2], 4, num_thoughts=2, thought_length=6)
    assert {*li.CONTROLS, "with", "alone"} == {*found}
    assert {values.shape for values in found.values()} == {(len(TEXTS), 4)}


def test_the_gain_by_hand():
    given = {
        "without": np.array([[-1.0, -9.0], [-2.0, -3.0]]),
        "with": np.array([[-1.0, -4.0], [-2.0, -3.0]]),
        "filler": np.array([[-1.0, -4.0], [-2.0, -4.0]]),
    }
    gain = li.log_likelihood_gain(given)
    assert gain["all"][0] == pytest.approx(1.25) and gain["hardest"][0] == pytest.approx(5.0)
    over = li.log_likelihood_gain(given, control="filler")
    assert over["all"][0] == pytest.approx(0.25) and over["hardest"][0] == pytest.approx(0.0)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_foreign_thoughts_are_never_a_texts_own(batch_size):
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.8)
    texts = [text_of(p) for p in problems("test", 5)]
    budget = {"num_thoughts": 2, "thought_length": 6, "controls": True}
    found = li.text_log_likelihood(model, tokenizer, texts, 4, batch_size, **budget)
    assert (np.nan_to_num(found["foreign"]) != np.nan_to_num(found["with"])).any(1).all()
    with pytest.raises(ValueError, match="texts"):
        li.text_log_likelihood(model, tokenizer, texts[:1], 4, batch_size, **budget)
