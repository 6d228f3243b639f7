"""The whole chain, champion included, once per seed: one row of numbers each, and what they say together."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

from ..errors import UpstreamError
from ..files import REPOSITORY
from ..stats import column, seed_interval, shown
from ..workbook.params import read_variant
from ..workbook.stage import read_stage
from .arms import repeat

OVER_CONTROLS = ("ablation_gain", "foreign_gain", "shuffled_gain", "filler_gain", "training_gain")
# Stage -> what a row keeps of its summary.
MEASURED = {
    "01_token_setup": "prompted_accuracy direct_accuracy".split(),
    "03_baking": "baking_accuracy thinking_use strategy_fit gap_closed "
    "direct_accuracy_champion direct_accuracy_baked".split(),
    "05_rl": "accuracy_baseline accuracy_with accuracy_gain greedy_baseline greedy_with".split(),
    "06_anti_theater": ["divergence", *OVER_CONTROLS, "coherence_utility_r", "within_r"]
    + "accuracy_own accuracy_none checks_reached checks cheats_caught".split(),
}
# What comes with the ends of its interval over problems.
WITH_INTERVAL = ("accuracy_gain", "divergence", *OVER_CONTROLS, "coherence_utility_r", "within_r")
# What a mean over seeds must reach. Where it is 0, the interval over problems of every single seed must lie above it.
CHAIN_TARGETS = (
    {"baking_accuracy": 0.85, "thinking_use": 0.95, "strategy_fit": 0.9, "gap_closed": 0.8, "direct_change": -0.05}
    | {"accuracy_gain": 0.05, "divergence": 0.3, **dict.fromkeys(OVER_CONTROLS, 0)}
    | {"coherence_utility_r": 0.6, "within_r": 0.5}
)


def summary_keys(stage: str) -> list[str]:
    """Return the keys of a stage's summary that a row keeps, ends of intervals included."""
    ends = {name: ("", "_low", "_high") if name in WITH_INTERVAL else ("",) for name in MEASURED[stage]}
    return [f"{name}{end}" for name in MEASURED[stage] for end in ends[name]]


def chain_row(run: str | Path) -> dict:
    """Return what the stages of one run measured (:data:`MEASURED`), with two numbers more.

    ``direct_change``: accuracy of direct answers, the baked model's minus the champion's. ``chain_seconds``: how long
    the stages took. Raises ``UpstreamError`` if a stage is not finished or too old.
    """
    row, seconds, name = {}, 0.0, Path(run).name
    for stage in MEASURED:
        record, reason = read_stage(Path(run) / stage)
        if record is None:
            raise UpstreamError(f"{name} has no {stage} ({reason}); make it with `make run RUN={name}`")
        if missing := [key for key in summary_keys(stage) if key not in record["summary"]]:
            raise UpstreamError(f"{name} was made by an older version, without {missing[0]}; make its {stage} again")
        row |= {key: record["summary"][key] for key in summary_keys(stage)}
        seconds += record["wall_s"]
    change = row["direct_accuracy_baked"] - row["direct_accuracy_champion"]
    return row | {"direct_change": change, "chain_seconds": seconds}


def make_run(name: str, seed: int, stages, variant: str) -> None:
    """Run some stages of a variant as ``make run`` does, and keep what is finished. Raises ``CalledProcessError``."""
    command = ["--variant", variant, "--run", name, "--seed", str(seed), "--keep", "--only", *stages]
    subprocess.run([sys.executable, "-m", "qs_lib.workbook.run", *command], check=True, cwd=REPOSITORY)


def made_with(run: Path, settings: dict[str, dict], seed: int) -> bool:
    """Say whether all stages of a run that ``settings`` names are finished, with that seed and those parameters."""
    records = [(read_stage(run / stage)[0], given.items()) for stage, given in settings.items()]
    return all(r is not None and r["seed"] == seed and r["parameters"].items() >= given for r, given in records)


def chain(run: Path, folder: Path, seeds) -> None:
    """Make every seed's run and its row. The seed draws everything, from the champion's weights to the thoughts."""
    measure = lambda _, seed, __: chain_row(seed_run(run, seed))  # stages have checkpoints of their own
    repeat(folder / "chain.csv", {"pocket": read_variant("pocket")}, seeds, measure)


def seed_run(run: Path, seed: int, stages=("01", "02", "03", "05", "06"), variant: str = "pocket") -> Path:
    """Return a variant's run of a seed, whose ``stages`` are made where they are missing.

    It is ``run`` itself if its stages were made with that seed and today's parameters, else ``<run>-seed<seed>``.
    """
    settings = {name: given for name, given in read_variant(variant).items() if name[:2] in stages}
    made = run.with_name(f"{run.name}-seed{seed}")
    for finished in (run, made):
        if made_with(finished, settings, seed):
            return finished
    make_run(made.name, seed, stages, variant)
    return made


def chain_table(rows: list[dict], arm: str = "pocket") -> pd.DataFrame:
    """Return a table of the numbers with a target and whether each is reached. Raises ``ValueError`` below two seeds.

    It shows the mean over seeds with Student's t interval, the least seed's and the least lower end over problems.
    """
    table = {}
    for name, target in CHAIN_TARGETS.items():
        values, mean = column(rows, arm, name), seed_interval(column(rows, arm, name))
        lows = column(rows, arm, f"{name}_low") if name in WITH_INTERVAL else []
        reached = min(lows) > 0 if target == 0 else mean[0] >= target
        row = {"mean over seeds": shown(mean, signed=target <= 0), "least": round(min(values), 3)}
        row |= {"least lower end": round(min(lows), 3) if lows else ""}
        row |= {"target": "every seed above 0" if target == 0 else f">= {target}"}
        table[name] = row | {"reached": "yes" if reached else "no"}
    return pd.DataFrame(table).T
