"""Numbers of the whole chain over seeds, from run folders with known summaries."""

import pytest

from qs_lib.errors import UpstreamError
from qs_lib.experiments import chain as chain_seeds
from qs_lib.experiments.chain import MEASURED, chain, chain_row, chain_table, summary_keys
from qs_lib.files import read_rows, run_folder
from qs_lib.workbook.params import NOTEBOOKS
from qs_lib.workbook.stage import start_stage


def finish(run_name: str, seed: int, **known):
    """A run with .7 everywhere but for ``known``."""
    for stage in MEASURED:
        summary = dict.fromkeys(summary_keys(stage), 0.7)
        given = {key: value for key, value in known.items() if key in summary}
        start_stage(NOTEBOOKS[stage](run_name=run_name, seed=seed), stage).finish(summary | given)
    return run_folder(run_name)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def rows(outputs, monkeypatch):
    """Three seeds whose training gains are .01, .03 and .05, each +- .02 over problems; the chain itself is not run."""
    started = []

    def make_run(name, seed, stages, variant):
        gain = 0.01 + 0.02 * seed
        started.append(seed)
        finish(
            name,
            seed,
            training_gain=gain,
            training_gain_low=gain - 0.02,
            training_gain_high=gain + 0.02,
            direct_accuracy_baked=0.66,
        )

    monkeypatch.setattr(chain_seeds, "make_run", make_run)
    for _ in range(2):  # what has its row is not run again
        chain(outputs / "pocket", outputs / "experiments", [0, 1, 2])
    assert started == [0, 1, 2]
    return read_rows(outputs / "experiments" / "chain.csv")


def test_a_row_is_what_the_stages_measured(rows):
    row = rows[1]
    assert row["seed"] == 1 and row["checks"] == 0.7 and row["within_r"] == 0.7
    assert row["direct_change"] == pytest.approx(-0.04)
    assert [row[f"training_gain{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.03, 0.01, 0.05])


def test_the_table_by_hand(rows):
    table = chain_table(rows)
    half = 4.302653 * 0.02 / 3**0.5  # Student's t, two degrees of freedom
    gain = table.loc["training_gain"]
    assert gain["mean over seeds"] == f"+0.030 [{0.03 - half:+.3f}, {0.03 + half:+.3f}]"
    assert (gain["least"], gain["least lower end"]) == (0.01, -0.01)
    assert table["reached"].to_dict() == {name: "yes" for name in table.index} | {
        "baking_accuracy": "no",
        "thinking_use": "no",
        "strategy_fit": "no",
        "gap_closed": "no",
        "training_gain": "no",
    }
    with pytest.raises(ValueError, match="at least two"):
        chain_table(rows[:1])


def test_a_run_stands_for_its_own_seed_and_parameters_only(outputs):
    folder = finish("pocket", 3)
    assert chain_seeds.made_with(folder, {"03_baking": {}, "05_rl": {"run_name": "pocket"}}, 3)
    assert not chain_seeds.made_with(folder, {"03_baking": {}}, 4)
    assert not chain_seeds.made_with(folder, {"05_rl": {"steps": -1}}, 3)
    assert not chain_seeds.made_with(folder, {"07_latency": {}}, 3)


def test_an_unfinished_or_old_run_is_refused(outputs):
    with pytest.raises(UpstreamError, match="s9 has no 01_token_setup .not run yet.; make it with `make run RUN=s9`"):
        chain_row(outputs / "s9")
    folder = finish("old", 0)
    start_stage(NOTEBOOKS["06_anti_theater"](run_name="old"), "06_anti_theater").finish({"divergence": 0.9})
    with pytest.raises(UpstreamError, match="older version, without divergence_low; make its 06_anti_theater again"):
        chain_row(folder)
