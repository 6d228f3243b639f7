import csv
import json

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from qs_lib import files, stats
from qs_lib.errors import StageError
from qs_lib.evaluation.accuracy import read_problems
from qs_lib.experiments import __main__, baking, grokking
from qs_lib.experiments import arms as experiments
from qs_lib.files import find_run


def counting(fail_at=None):
    calls = []

    def measure(settings, seed, checkpoint):
        calls.append((settings["x"], seed))
        if len(calls) == fail_at:
            raise RuntimeError("power cut")
        return {"value": settings["x"] + seed, "curve": [0.5, 1]}

    return calls, measure


ARMS = {"one": {"x": 1}, "two, with comma": {"x": 2}}


def test_an_interrupted_experiment_repeats_only_what_is_missing(tmp_path):
    path = tmp_path / "experiments" / "e.csv"
    calls, measure = counting(fail_at=3)
    with pytest.raises(RuntimeError, match="power cut"):
        experiments.repeat(path, ARMS, [0, 1], measure)
    kept = path.read_text()
    calls, measure = counting()
    rows = experiments.repeat(path, ARMS, [0, 1], measure)
    assert calls == [(1, 1), (2, 1)] and path.read_text().startswith(kept)
    assert [(r["arm"], r["seed"], r["value"]) for r in rows] == [
        ("one", 0, 1),
        ("one", 1, 2),
        ("two, with comma", 0, 2),
        ("two, with comma", 1, 3),
    ]
    assert rows[0]["curve"] == [0.5, 1] and rows[0]["threads"] >= 1 and rows[0]["seconds"] >= 0
    calls, measure = counting()
    assert experiments.repeat(path, ARMS, [0, 1], measure) == rows and calls == []


def test_a_stopped_arm_goes_on_where_it_was(tmp_path):
    """Each arm gets a checkpoint of its own identity, which is gone once its row is written."""
    seen = []

    def measure(settings, seed, checkpoint, stop=False):
        parts = {"steps": []}
        with checkpoint as saving:
            first = saving.resume(parts)
            for step in range(first, 4):
                parts["steps"].append(step)
                saving.after(step + 1, parts, last=True)
                if step == 1 and stop:
                    raise RuntimeError("power cut")
        seen.append((settings["x"], first, parts["steps"]))
        return {"value": 1}

    with pytest.raises(RuntimeError, match="power cut"):
        experiments.repeat(tmp_path / "e.csv", ARMS, [0], lambda *given: measure(*given, stop=True))
    experiments.repeat(tmp_path / "e.csv", ARMS, [0], measure)
    assert seen == [(1, 2, [0, 1, 2, 3]), (2, 0, [0, 1, 2, 3])]
    assert sorted(p.name for p in tmp_path.iterdir() if "lock" not in p.name) == ["e.csv"]


def test_other_settings_replace_a_row_and_plain_readers_read_the_file(tmp_path):
    path = tmp_path / "e.csv"
    _, measure = counting()
    experiments.repeat(path, ARMS, [0], measure)
    calls, measure = counting()
    experiments.repeat(path, ARMS | {"one": {"x": 7}}, [0], measure)
    assert calls == [(7, 0)]
    with open(path, newline="") as file:
        rows = {r["arm"]: r for r in csv.DictReader(file)}
    assert len(rows) == 2 and rows["one"]["value"] == "7" and json.loads(rows["one"]["settings"]) == {"x": 7}


def test_two_processes_may_not_write_one_file(tmp_path):
    from filelock import FileLock

    _, measure = counting()
    with FileLock(tmp_path / ".e.lock"), pytest.raises(StageError, match="in use"):
        experiments.repeat(tmp_path / "e.csv", ARMS, [0], measure)


def test_interval_over_seeds_against_scipy():
    values = [0.84, 0.86, 0.87, 0.85]
    mean, low, high = stats.seed_interval(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), expected.low, expected.high))
    with pytest.raises(ValueError, match="at least two"):
        stats.seed_interval([1.0])


def test_differences_are_paired_by_seed_in_any_order():
    rows = [
        {"arm": a, "seed": s, "accuracy": v}
        for a, s, v in [("new", 2, 0.7), ("new", 1, 0.5), ("old", 1, 0.4), ("old", 2, 0.6)]
    ]
    assert stats.difference(rows, "new", "old", "accuracy") == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="same seeds"):
        stats.difference(rows[1:], "new", "old", "accuracy")
    with pytest.raises(ValueError, match="same seeds and data"):
        stats.difference([rows[0] | {"data": "made anew"}, *rows[1:]], "new", "old", "accuracy")


def optimizer_rows(**accuracy):
    """Three seeds an arm, with the same noise in all of them, so that only the difference of the means is left."""
    arms = dict(zip(baking.LOWEST, accuracy.values(), strict=True))
    noise = {"AdamW": (0, 0.001, -0.001), "Muon": (0.001, 0, 0), "Muon, matched momentum": (0, 0, 0.001)}
    return [
        {"arm": a, "seed": s, "accuracy": m + noise.get(a, (0, 0, 0))[s]} for a, m in arms.items() for s in range(3)
    ]


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        ({"adamw": 0.8, "muon": 0.8, "matched": 0.8, "grokfast": 0.9}, "Grokfast helps"),
        ({"adamw": 0.8, "muon": 0.8, "matched": 0.9, "grokfast": 0.9}, "no more than a slower momentum"),
        ({"adamw": 0.8, "muon": 0.9, "matched": 0.9, "grokfast": 0.8}, "Grokfast hurts"),
        ({"adamw": 0.7, "muon": 0.8, "matched": 0.8, "grokfast": 0.8}, "no gain from Grokfast is shown"),
    ],
)
def test_the_conclusion_follows_from_the_rows(accuracy, verdict):
    sentence = baking.optimizer_conclusion(optimizer_rows(**accuracy))
    assert verdict in sentence and "3 seeds" in sentence and all(n in sentence for n in baking.LOWEST)


def test_scan_takes_the_best_rate_and_widens_at_an_edge():
    scan = [
        {"settings": {"optimizer": "AdamW", "rate": r}, "validation_accuracy": v}
        for r, v in ((4e-3, 0.8), (1e-3, 0.7), (2e-3, 0.8))
    ]
    assert baking.best_rates(scan) == {"AdamW": 2e-3}
    assert baking.edge([1, 2, 4, 8], 4) is None
    assert baking.edge([1, 2, 4, 8], 8) == 16 and baking.edge([1, 2, 4, 8], 1) == 0.5
    assert baking.edge([0.25, 0.5, 1, 2, 4, 8], 0.25) is None


@pytest.mark.parametrize(("momentum", "strength", "alpha"), [(0.95, 0.2, 0.98), (0.9, 2.0, 0.98), (0.95, 0.0, 0.9)])
def test_matched_momentum_has_the_mean_lag_of_the_filter(momentum, strength, alpha):
    """Against the impulse response: one gradient of 1, then zeros; the lag is the response's mean time."""
    steps, slow, average, response = 20_000, 0.0, 0.0, []
    for k in range(steps):
        g = float(k == 0)
        slow = alpha * slow + (1 - alpha) * g
        average = momentum * average + (1 - momentum) * (g + strength * slow)
        response.append(average)
    lag = np.dot(response, range(steps)) / np.sum(response)
    matched = grokking.matched_momentum(momentum, strength, alpha)
    assert matched / (1 - matched) == pytest.approx(lag, rel=1e-6)


def test_halves_of_the_addition_table_share_no_sum():
    (train, sums), (held, _) = grokking.addition_table(0, 7)
    both = [frozenset(p) for p in train.tolist() + held.tolist()]
    assert len(set(both)) == len(both) == 28 and len(train) == 14
    assert all((a + b) % 7 == s for (a, b), s in zip(train.tolist(), sums.tolist(), strict=True))


def test_grokking_command_writes_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(grokking, "SETTINGS", grokking.SETTINGS | {"steps": 4, "every": 2})
    __main__.main(["grokking", "--upstream", str(tmp_path), "--seeds", "3"])
    rows = files.read_rows(tmp_path / "experiments" / "grokking.csv")
    assert len(rows) == len(grokking.methods()) * len(grokking.RATES) and {r["seed"] for r in rows} == {3}
    assert all(r["steps"] == [0, 2, 4] and len(r["validation"]) == 3 for r in rows)
    assert rows[0]["train"][0] == rows[2]["train"][0] and rows[0]["understood"] is None
    curves = grokking.mean_curves(grokking.best_rows(rows))
    assert [x for x, _ in curves["AdamW, training half"]] == [0, 2, 4] and len(curves) == 4


@pytest.mark.parametrize(
    ("plain", "matched", "filtered", "verdict"),
    [
        (900, 800, 400, "accelerates, and not only"),
        (900, 400, 400, "accelerates, but no more"),
        (400, 400, 400, "no acceleration"),
        (400, 400, None, "the filter delays"),
    ],
)
def test_the_grokking_conclusion_follows_from_each_method_at_its_best_rate(plain, matched, filtered, verdict):
    steps = dict(zip(grokking.methods(), (plain, matched, filtered), strict=True))
    rows = [
        {
            "arm": f"{a}, rate {lr:g}",
            "seed": s,
            "settings": {"lr": lr, "steps": 3000},
            "understood": v and v + 10 * (s if a == "AdamW" else 0) + (lr != 0.01) * 50,
        }
        for a, v in steps.items()
        for s in range(3)
        for lr in (3e-3, 0.01)
    ]
    best = grokking.best_rows(rows)
    assert len(best) == 9 and {r["settings"]["lr"] for r in best if r["understood"]} == {0.01}
    assert verdict in grokking.acceleration(best)


def test_one_small_baking_run_of_the_committed_champion(monkeypatch):
    monkeypatch.setattr(baking, "read_problems", lambda path: read_problems(path)[:6])
    settings = baking.baking_recipe() | {"examples": 4, "trajectories": 4, "epochs": 1}
    row = baking.bake_once(find_run(""), settings, 1)
    assert row["direct_change"] == pytest.approx(row["direct_after"] - row["direct_before"], abs=1e-4)
    assert {"validation_accuracy", "gap_closed", "accuracy", "thinking_use", "strategy_fit"} <= row.keys()
    settings |= {"optimizer": "AdamW", "rate": 1e-3}
    assert "accuracy" not in baking.bake_once(find_run(""), settings, 1, tested=False)


def test_arms_differ_in_what_their_names_say():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    made = {name: baking.make_optimizer(name, 0.006)(model) for name in baking.LOWEST}
    assert {g["weight_decay"] for o in made.values() for g in o.param_groups} == {0.0}
    muon, matched, subject = (o.param_groups for n, o in made.items() if n != "AdamW")
    assert [g["lr"] for g in muon] == [g["lr"] for g in matched] == [g["lr"] for g in subject] == [0.006, 0.001]
    assert [o[0]["grokfast_lambda"] for o in (muon, matched, subject)] == [0, 0, 0.2]
    assert [round(o[0]["momentum"], 4) for o in (muon, matched, subject)] == [0.95, 0.9645, 0.95]


def test_optimizers_scan_widens_and_measures_other_seeds(tmp_path, monkeypatch):
    """AdamW's planted best rate lies below its scan, the others' inside it; the chosen rates run on seeds 1 and 2."""
    best, calls = {"AdamW": 0.5e-3}, []

    def planted(run, settings, seed, checkpoint, tested=True):
        name, rate = settings["optimizer"], settings["rate"]
        calls.append((name, rate, seed, tested))
        return {"validation_accuracy": -abs(np.log2(rate / best.get(name, 6e-3)))} | (
            {"accuracy": 0.8} if tested else {}
        )

    monkeypatch.setattr(baking, "bake_once", planted)
    baking.optimizers(tmp_path, tmp_path, [0, 1])
    scan, tested = ([c[:3] for c in calls if c[3] is kind] for kind in (False, True))
    assert {seed for *_, seed in scan} == {0} and {seed for *_, seed in tested} == {1, 2}
    assert sorted(rate for name, rate, _ in scan if name == "AdamW") == [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3, 8e-3]
    assert {(name, rate) for name, rate, _ in tested} == {
        ("AdamW", 0.5e-3),
        *((name, 6e-3) for name in baking.LOWEST if name != "AdamW"),
    }
    points = baking.scan_lines(files.read_rows(tmp_path / "optimizers_scan.csv"))
    assert points["Muon"] == sorted(points["Muon"]) and len(points["Muon"]) == 4


def test_tables_of_seeds_and_optimizers():
    rows = [
        {
            "arm": a,
            "seed": s,
            "accuracy": 0.86,
            "thinking_use": 1,
            "strategy_fit": 1,
            "gap_closed": 0.9 + s / 100,
            "direct_change": -0.06,
            "settings": {"rate": 0.006},
            "seconds": 10,
        }
        for a in baking.LOWEST
        for s in range(3)
    ]
    table = baking.seeds_table(rows)
    assert table.loc["accuracy", "Muon: reached"] == "yes" and table.loc["direct_change", "Muon: reached"] == "no"
    assert table.loc["direct_change", "AdamW"] == "-0.060 [-0.060, -0.060]"
    assert baking.optimizer_table(rows).loc["AdamW", "rate"] == "0.006"


def test_a_cell_is_read_back_as_what_was_written(tmp_path):
    row = {
        "nothing missed": "",
        "digest": "12e345678901",
        "three": "3",
        "words": 'a, "b"',
        "list": [1, "2"],
        "none": None,
    }
    files.write_rows(tmp_path / "rows.csv", [row, {"more": 1.5}])
    assert files.read_rows(tmp_path / "rows.csv") == [row, {"more": 1.5}]
