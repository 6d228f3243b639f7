"""Anti-theater numbers of several seeds, from run folders with known summaries."""

import pytest

from qs_lib.params import AntiTheater
from qs_lib.stage import UpstreamError, run_folder, start_stage
from qs_lib.theater_seeds import INTERVALS, NUMBERS, over_seeds, theater_row


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three finished runs whose training gains are .01, .03 and .05, each +- .02 over problems."""
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    for seed, gain in enumerate((0.01, 0.03, 0.05)):
        summary = {f"{name}{end}": 0.7 for name in INTERVALS for end in ("", "_low", "_high")} | dict.fromkeys(NUMBERS, 7)
        summary |= {"training_gain": gain, "training_gain_low": gain - 0.02, "training_gain_high": gain + 0.02}
        start_stage(AntiTheater(run_name=f"s{seed}", seed=seed), "06_anti_theater").finish(summary)
    return [run_folder(f"s{seed}") for seed in range(3)]


def test_a_row_is_what_the_stage_measured(runs):
    row = theater_row(runs[1])
    assert row["seed"] == 1 and row["checks"] == 7 and row["within_r"] == 0.7
    assert [round(row[f"training_gain{end}"], 3) for end in ("", "_low", "_high")] == [0.03, 0.01, 0.05]


def test_over_seeds_by_hand(runs):
    row = over_seeds(runs)
    half = 4.302653 * 0.02 / 3**0.5  # Student's t, two degrees of freedom
    assert row["seeds"] == [0, 1, 2]
    assert [row[f"training_gain{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.03, 0.03 - half, 0.03 + half])
    assert row["training_gain_min"] == 0.01 and row["training_gain_min_low"] == pytest.approx(-0.01)
    assert row["coherence_utility_r"] == pytest.approx(0.7) == row["coherence_utility_r_low"]


def test_what_cannot_be_put_together_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="repeat a seed"):
        over_seeds([runs[0], runs[0]])
    with pytest.raises(ValueError, match="at least two"):
        over_seeds(runs[:1])
    with pytest.raises(UpstreamError, match="s9 has no anti-theater numbers .not run yet.; make them with `make run RUN=s9`"):
        theater_row(tmp_path / "s9")
    start_stage(AntiTheater(run_name="old"), "06_anti_theater").finish({"divergence": 0.9})
    with pytest.raises(UpstreamError, match="older version, without divergence_low"):
        theater_row(run_folder("old"))
