"""The scoreboard lists every criterion, whatever a run did or did not measure, and judges by the rules."""

import json
import shutil
from pathlib import Path

import pytest

from qs_lib.workbook import scoreboard as s
from qs_lib.workbook.params import Reinforce, Scoreboard
from qs_lib.workbook.run import print_scoreboard
from qs_lib.workbook.stage import start_stage

IDS = [
    "tokens_added",
    "examples",
    "strategies",
    "baking_accuracy",
    "gap_closed",
    "thinking_use",
    "strategy_fit",
    "accuracy_gain",
    "accuracy_with",
    "accuracy_without",
    "divergence",
    "ablation_gain",
    "foreign_gain",
    "filler_gain",
    "coherence_utility_r",
    "follow_through",
    "latency_ms",
    "latency_p95_ms",
    "parallel_speedup",
    "memory_overhead",
    "jumpstart",
    "nonmyopic_steps",
    "nonmyopic_accuracy",
    "token_scale_use",
    "over_answers_alone",
    "anywhere_nll",
    "hard_nll",
    "coverage",
]
GOOD = {
    "01_token_setup": {"tokens_added": 8},
    "02_dataset_generation": {"verified": 1800, "strategies": 7},
    "03_baking": {"baking_accuracy": 0.85, "gap_closed": 0.9, "thinking_use": 0.81, "strategy_fit": 0.61},
    "05_rl": {
        "accuracy_gain": 0.05,
        "accuracy_gain_low": 0.01,
        "accuracy_gain_high": 0.09,
        "accuracy_with": 0.9,
        "accuracy_without": 0.4,
    },
    "06_anti_theater": {"divergence": 0.31, "coherence_utility_r": 0.51, "follow_through": 0.9}
    | {
        f"{n}_gain{end}": v
        for n in ("ablation", "foreign", "filler")
        for end, v in (("", 0.2), ("_low", 0.1), ("_high", 0.3))
    },
    "07_latency": {"latency_ms": 199.0, "latency_p95_ms": 199.9, "parallel_speedup": 3.7, "memory_overhead": 0.33},
}
EXPERIMENTS = {"jumpstart": 0.3, "nonmyopic_steps": -0.25, "nonmyopic_accuracy": 0.044, "token_scale_use": 0.89}
EXPERIMENTS |= {"over_answers_alone": 0.3, "anywhere_nll": -0.01, "hard_nll": 0.2}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run folder whose stages all reach their targets, just."""
    root = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QS_OUTPUTS", str(root))
        for stage in GOOD:
            finish(stage)
    (root / "a" / "experiments").mkdir()
    for name, value in EXPERIMENTS.items():
        experiment(root / "a", name, value)
    (root / "a" / "coverage.json").write_text(json.dumps({"totals": {"percent_covered": 90.0}}))
    return root / "a"


@pytest.fixture
def run(template, tmp_path, monkeypatch):
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    return Path(shutil.copytree(template, tmp_path / "a"))


def finish(stage, **changes):
    started = start_stage(Reinforce(run_name="a"), stage)
    started.write_json("numbers.json", [1])
    started.finish(GOOD[stage] | changes)


def experiment(run, name, value):
    text = json.dumps({"value": value, "low": None, "high": None, "command": "python x.py"})
    (run / "experiments" / f"{name}.json").write_text(text)


def row(run, name):
    return next(r for r in s.build_scoreboard(run) if r["id"] == name)


def test_every_criterion_is_listed_in_order_even_for_a_run_that_did_nothing(tmp_path):
    board = s.build_scoreboard(tmp_path / "nothing")
    assert [r["id"] for r in board] == IDS
    for r in board:
        assert list(r) == ["id", "criterion", "target", "value", "low", "high", "unit", "reached", "source"]
        assert r["value"] is None and r["reached"] is False and r["source"]
        assert s.outcome(r) == "not reached (not measured)" and s.value_text(r) == "-"
    assert list(s.missing_stages(tmp_path / "nothing")) == list(s.CHAIN_STAGES)


def test_a_run_that_reaches_everything(run):
    board = s.build_scoreboard(run)
    reported = [r["id"] for r in board if r["reached"] is None]
    assert reported == ["accuracy_with", "accuracy_without"]
    assert [r["id"] for r in board if r["reached"] is False] == []
    assert list(s.missing_stages(run)) == ["04_parallel_thoughts"]
    json.dumps(board, allow_nan=False)


@pytest.mark.parametrize(
    ("stage", "changes", "name"),
    [
        ("01_token_setup", {"tokens_added": 7}, "tokens_added"),
        ("02_dataset_generation", {"verified": 1799}, "examples"),
        ("02_dataset_generation", {"strategies": 6}, "strategies"),
        ("03_baking", {"baking_accuracy": 0.849}, "baking_accuracy"),
        ("03_baking", {"gap_closed": 0.89}, "gap_closed"),
        ("03_baking", {"thinking_use": 0.8}, "thinking_use"),
        ("03_baking", {"strategy_fit": 0.6}, "strategy_fit"),
        ("05_rl", {"accuracy_gain": 0.049}, "accuracy_gain"),
        ("05_rl", {"accuracy_gain_low": -0.001}, "accuracy_gain"),
        ("06_anti_theater", {"divergence": 0.3}, "divergence"),
        ("06_anti_theater", {"ablation_gain_low": 0.0}, "ablation_gain"),
        ("06_anti_theater", {"foreign_gain_low": -0.1}, "foreign_gain"),
        ("06_anti_theater", {"filler_gain_low": -0.1}, "filler_gain"),
        ("06_anti_theater", {"coherence_utility_r": 0.5}, "coherence_utility_r"),
        ("06_anti_theater", {"follow_through": 0.89}, "follow_through"),
        ("07_latency", {"latency_ms": 200.0}, "latency_ms"),
        ("07_latency", {"latency_p95_ms": 201.0}, "latency_p95_ms"),
        ("07_latency", {"parallel_speedup": 3.6}, "parallel_speedup"),
        ("07_latency", {"memory_overhead": 0.34}, "memory_overhead"),
    ],
)
def test_each_target_can_be_missed(run, stage, changes, name):
    finish(stage, **changes)
    missed = [r["id"] for r in s.build_scoreboard(run) if r["reached"] is False]
    assert missed == [name] and s.outcome(row(run, name)) == "not reached"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_outside_the_chain_can_be_missed(run, name):
    experiment(run, name, EXPERIMENTS[name] + (0.01 if name == "nonmyopic_steps" else -0.01))
    assert row(run, name)["reached"] is False
    assert "python x.py" in row(run, name)["source"]


def test_coverage_is_a_share(run):
    assert row(run, "coverage")["value"] == 0.9
    (run / "coverage.json").write_text(json.dumps({"totals": {"percent_covered": 89.9}}))
    assert row(run, "coverage")["reached"] is False


def test_a_value_the_system_cannot_tell_is_not_reached(run):
    finish("07_latency", memory_overhead=None)
    assert row(run, "memory_overhead")["value"] is None and row(run, "memory_overhead")["reached"] is False


def test_a_changed_file_takes_its_stage_off_the_board(run):
    (run / "06_anti_theater" / "numbers.json").write_text("[2]")
    found = row(run, "divergence")
    assert found["value"] is None and "changed" in found["source"]
    assert "06_anti_theater" in s.missing_stages(run)
    assert "changed" in s.provenance(run / "06_anti_theater")


def test_intervals_and_sources_are_told(run):
    found = row(run, "accuracy_gain")
    assert (found["low"], found["high"]) == (0.01, 0.09)
    assert found["source"].startswith("05_rl/run.json, ") and "papermill" in found["source"]
    assert s.value_text(found) == "0.05 [0.01, 0.09] share"
    assert "seed 0" in s.provenance(run / "05_rl")


def test_the_driver_prints_it(run, tmp_path, capsys):
    path = tmp_path / "board.json"
    path.write_text(json.dumps(s.build_scoreboard(run)))
    print_scoreboard(path)
    printed = capsys.readouterr().out
    assert all(name in printed for name in IDS) and f"of {len(IDS)}" in printed


def test_ladder(run):
    steps = s.ladder_steps(run)
    assert steps["after RL, with thoughts"][0] == 0.9
    assert steps["champion, direct"] == (None, None, None)


def test_model_card_tells_misses_and_survives_reading(run, tmp_path):
    finish("05_rl", accuracy_gain=0.0)
    card = s.model_card(s.build_scoreboard(run), run)
    card.save(tmp_path / "README.md")
    again = type(card).load(tmp_path / "README.md")
    assert again.data.license == "apache-2.0" and "quiet-star" in again.data.tags
    assert all(f"| {name} |" in again.text for name in IDS)
    assert "0 [0.01, 0.09] share | not reached |" in again.text
    assert "AutoModelForCausalLM" in again.text and "{" not in again.text.split("## Scores")[1]


def test_files_are_handed_over_to_the_model_they_were_measured_on_only(run, tmp_path):
    (run / "quietstar").mkdir()
    for upstream, expected in (("a", True), ("other", False)):
        (tmp_path / "other").mkdir(exist_ok=True)
        stage = start_stage(Scoreboard(run_name="a", upstream=upstream), "08_scoreboard")
        stage.write_json("latency.json", {"upstream": upstream})
        assert s.hand_over(stage, "latency.json") is expected
        stage.finish({})
    assert json.loads((run / "quietstar" / "latency.json").read_text()) == {"upstream": "a"}
