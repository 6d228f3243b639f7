"""Claims over seeds, from rows whose numbers were made up so that every answer is known."""

import json
import math

import pytest

from qs_lib.experiments import findings as f
from qs_lib.files import write_rows


def row(arm, seed, accuracy, gain=0.1, validation=(0.5, 0.7, 0.9, 0.9), **more):
    settings = {"evaluate_every": 25, "steps": 90}
    values = {
        "greedy_gain": gain,
        "beyond_temperature": gain,
        "baseline": accuracy - gain,
        "greedy": accuracy,
        "without": 0.5,
        "thinking_use": 1.0,
    }
    return {
        "arm": arm,
        "seed": seed,
        "settings": settings,
        "accuracy": accuracy,
        "gain": gain,
        "validation": list(validation),
        **values,
        **more,
    }


def test_pairs_are_of_equal_seeds():
    rows = [row("a", 0, 0.9), row("a", 1, 0.8), row("a", 2, 0.7), row("b", 2, 0.6), row("b", 0, 0.85)]
    assert f.paired(rows, "a", "b", "accuracy") == pytest.approx([0.05, 0.1])
    other = [r | {"data": "x" if (r["arm"], r["seed"]) == ("b", 0) else "y"} for r in rows]
    assert f.paired(other, "a", "b", "accuracy") == pytest.approx([0.1]), "not from the same model"


def test_a_claim_is_reached_refuted_or_open():
    assert f.decided([0.08, 0.09, 0.10], 0.05) == "reached"
    assert f.decided([0.00, 0.01, 0.02], 0.05) == "refuted"
    assert f.decided([0.00, 0.05, 0.10], 0.05) == "open"
    assert f.decided([-0.5, -0.4, -0.45], -0.25, above=False) == "reached"
    assert f.decided([0.08, 0.09, 0.10], 0.0, above=False) == "refuted"


def test_steps_to_an_accuracy():
    one = row("a", 0, 0.9)
    assert f.steps_to(one, 0.6) == 50 and f.steps_to(one, 0.5) == 25 and f.steps_to(one, 0.95) == math.inf
    assert f.steps_to(row("a", 0, 0.9, validation=[0.1, 0.1, 0.1, 0.9]), 0.9) == 90, (
        "the last validation is at the last step"
    )


def test_fewer_steps_to_what_both_reach():
    rows = [row("a", s, 0.9, validation=[0.8, 0.9, 0.9, 0.9]) for s in (0, 1)]
    rows += [row("b", s, 0.9, validation=[0.1, 0.2, 0.88, 0.88]) for s in (0, 1)]
    ratios, never, level = f.fewer_steps(rows, "a", "b")
    assert level == 0.88 and never == 0 and ratios == pytest.approx([50 / 75 - 1] * 2)


def test_who_never_arrives_counts_with_all_its_steps():
    rows = [row("a", s, 0.9, gain=0.3, validation=[0.75, 0.85, 0.9, 0.9]) for s in (0, 1)]  # they began at .6: to .8
    rows += [row("b", 0, 0.1, validation=[0.1] * 4), row("b", 1, 0.1, validation=[0.1, 0.1, 0.8, 0.9])]
    ratios, never, level = f.fewer_steps(rows, "a", "b", halve_errors=True)
    assert level == pytest.approx(0.8) and never == 1 and ratios == pytest.approx([50 / 90 - 1, 50 / 75 - 1])
    assert f.fewer_steps(rows, "a", "c")[0] == [], "no pair"


def planted():
    gains = {"full": (0.10, 0.09, 0.11), "pg off": (0.03, 0.04, 0.035), "KL 0": (0.099, 0.089, 0.109)}
    return [row(arm, s, 0.8 + g, g) for arm, each in gains.items() for s, g in enumerate(each)]


def test_planted_claims():
    table = f.claims(planted())
    assert table.loc["accuracy after RL minus baked", "decided"] == "reached"
    assert table.loc["pg off: gain, should not be above 0", "decided"] == "refuted"
    assert table.loc["REINFORCE itself: full minus pg off", "decided"] == "reached"
    assert table.loc["KL 0.1 minus 0", "decided"] == "refuted", "a tenth of a point, always, is less than a point"
    assert table.loc["KL 0.1 minus 0", "measured"] == "+0.001 [+0.001, +0.001]"
    assert "8 thoughts minus 4 in training" not in table.index, "what was not run is left out"
    assert f.arms_table(planted()).loc["pg off", "accuracy"] == "0.835"


def test_the_parts_are_drawn_in_points_with_their_verdicts():
    axis = f.objective_parts(planted()).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["KL 0.1 minus 0"], (
        "accuracy on both sides, claimed a point"
    )
    assert axis.lines[0].get_xdata() == pytest.approx([0.1] * 3) and [text.get_text() for text in axis.texts] == [
        "refuted"
    ]
    assert f.objective_parts([]).axes[0].get_yticklabels() == []


def test_the_figure_and_its_numbers():
    rows = [row("full", 0, 0.95, 0.1), row("from un-baked", 0, 0.4, 0.0)]
    axis = f.baking_depth(rows).axes[0]
    assert sorted(line.get_ydata()[0] for line in axis.lines) == pytest.approx([0.4, 0.4, 0.85, 0.95])
    assert f.depth_lines(rows) == ["none: 0.400 -> 0.400, seeds: 1", "all: 0.850 -> 0.950, seeds: 1"]


def test_the_scoreboard_gets_what_was_measured_and_no_more(tmp_path):
    rows = [r | {"validation": [0.8, 0.9, 0.96, 0.96]} for r in planted()]
    rows += [row("from un-baked", s, 0.1, 0, validation=[0.1] * 4) for s in range(3)]
    write_rows(tmp_path / "rl.csv", rows)
    f.for_scoreboard(tmp_path)
    assert [p.name for p in tmp_path.glob("*.json")] == ["jumpstart.json"]
    found = json.loads((tmp_path / "jumpstart.json").read_text())
    assert found["value"] == pytest.approx(1 - 50 / 90) and "does not get there in 3 of 3 seeds" in found["command"]
    write_rows(
        tmp_path / "look_ahead.csv",
        [row("n_true 4", 0, 0.95), row("n_true 4", 1, 0.96), row("n_true 1", 0, 0.9), row("n_true 1", 1, 0.9)],
    )
    f.for_scoreboard(tmp_path)
    accuracy = json.loads((tmp_path / "nonmyopic_accuracy.json").read_text())
    assert (
        accuracy["value"] == pytest.approx(0.055)
        and accuracy["seeds"] == 2
        and accuracy["low"] < 0.055 < accuracy["high"]
    )
