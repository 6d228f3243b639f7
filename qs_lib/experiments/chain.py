"""The whole chain, champion included, once per seed: one row of numbers each, and what they say together."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

from ..errors import UpstreamError
from ..files import REPOSITORY
from ..stats import column, seed_interval, shown
from ..workbook.params import stages_of
from ..workbook.stage import read_stage
from .arms import repeat

# Stage -> what is kept of its summary. Those of GAINS come with the ends of their interval over problems.
KEPT = {
    "01_token_setup": ("prompted_accuracy", "direct_accuracy"),
    "03_baking": (
        "baking_accuracy",
        "thinking_use",
        "strategy_fit",
        "gap_closed",
        "direct_accuracy_champion",
        "direct_accuracy_baked",
    ),
    "05_rl": ("accuracy_baseline", "accuracy_with", "accuracy_gain", "greedy_baseline", "greedy_with"),
    "06_anti_theater": (
        "divergence",
        "ablation_gain",
        "foreign_gain",
        "shuffled_gain",
        "filler_gain",
        "training_gain",
        "coherence_utility_r",
        "within_r",
        "accuracy_own",
        "accuracy_none",
        "checks_reached",
        "checks",
        "cheats_caught",
    ),
}
GAINS = (
    "accuracy_gain",
    "divergence",
    "ablation_gain",
    "foreign_gain",
    "shuffled_gain",
    "filler_gain",
    "training_gain",
    "coherence_utility_r",
    "within_r",
)
# What a mean over seeds must reach; where it is 0, the interval over problems of every single seed must lie above it.
TARGETS = {
    "baking_accuracy": 0.85,
    "thinking_use": 0.95,
    "strategy_fit": 0.9,
    "gap_closed": 0.8,
    "direct_change": -0.05,
    "accuracy_gain": 0.05,
    "divergence": 0.3,
    "ablation_gain": 0,
    "foreign_gain": 0,
    "shuffled_gain": 0,
    "filler_gain": 0,
    "training_gain": 0,
    "coherence_utility_r": 0.6,
    "within_r": 0.5,
}


def chain_row(run: str | Path) -> dict:
    """What the stages of one run measured, as in ``KEPT``, ``direct_change``: direct answers of the baked model minus the
    champion's, and ``chain_seconds``, which they took. Raises ``UpstreamError`` where a stage is not finished or too old."""
    row, seconds = {}, 0.0
    for stage, names in KEPT.items():
        record, reason = read_stage(Path(run) / stage)
        if record is None:
            raise UpstreamError(
                f"{Path(run).name} has no {stage} ({reason}); make it with `make run RUN={Path(run).name}`"
            )
        keys = [f"{name}{end}" for name in names for end in (("", "_low", "_high") if name in GAINS else ("",))]
        missing = [key for key in keys if key not in record["summary"]]
        if missing:
            raise UpstreamError(
                f"{Path(run).name} was made by an older version, without {missing[0]}; make its {stage} again"
            )
        row |= {key: record["summary"][key] for key in keys}
        seconds += record["wall_s"]
    change = row["direct_accuracy_baked"] - row["direct_accuracy_champion"]
    return row | {"direct_change": change, "chain_seconds": seconds}


def make_run(name: str, seed: int, stages, variant: str) -> None:
    """``make run`` of some stages of a variant; what is finished of it is kept. Raises ``CalledProcessError``."""
    command = ["--variant", variant, "--run", name, "--seed", str(seed), "--keep", "--only", *stages]
    subprocess.run([sys.executable, "-m", "qs_lib.workbook.run", *command], check=True, cwd=REPOSITORY)


def made_with(run: Path, settings: dict[str, dict], seed: int) -> bool:
    """Whether all stages of a run that are named in ``settings`` are finished, with that seed and those parameters."""
    records = {stage: read_stage(run / stage)[0] for stage in settings}
    return all(
        record is not None and record["seed"] == seed and record["parameters"].items() >= settings[stage].items()
        for stage, record in records.items()
    )


def chain(run: Path, folder: Path, seeds) -> None:
    """Every seed's run, and its row. The seed draws everything: the champion's weights and corpus, worked examples,
    held-out problems, thoughts."""

    def measure(_, seed: int, __) -> dict:  # stages have checkpoints of their own
        return {name: round(float(value), 5) for name, value in chain_row(seed_run(run, seed)).items()}

    repeat(folder / "chain.csv", {"pocket": stages_of("pocket")}, seeds, measure)


def seed_run(run: Path, seed: int, stages=("01", "02", "03", "05", "06"), variant: str = "pocket") -> Path:
    """A variant's run of a seed: ``run`` itself if its stages were made with that seed and today's parameters, else
    ``<run>-seed<seed>`` beside it, whose ``stages`` are made where they are missing."""
    settings = {name: given for name, given in stages_of(variant).items() if name[:2] in stages}
    made = run.with_name(f"{run.name}-seed{seed}")
    for finished in (run, made):
        if made_with(finished, settings, seed):
            return finished
    make_run(made.name, seed, stages, variant)
    return made


def chain_table(rows: list[dict], arm: str = "pocket") -> pd.DataFrame:
    """Each number with a target: mean with Student's t interval over seeds, the least of the seeds, the least lower end
    over problems, the target and whether it is reached. Raises ``ValueError`` below two seeds."""
    table = {}
    for name, target in TARGETS.items():
        values = column(rows, arm, name)
        lows = column(rows, arm, f"{name}_low") if name in GAINS else []
        reached = min(lows) > 0 if target == 0 else seed_interval(values)[0] >= target
        table[name] = {
            "mean over seeds": shown(seed_interval(values), signed=target <= 0),
            "least": round(min(values), 3),
            "least lower end": round(min(lows), 3) if lows else "",
            "target": "every seed above 0" if target == 0 else f">= {target}",
            "reached": "yes" if reached else "no",
        }
    return pd.DataFrame(table).T
