"""The anti-theater numbers of several runs that differ in their seed only, and what they say together."""

from pathlib import Path

from .experiments import seed_interval
from .stage import UpstreamError, read_stage

GAINS = ("ablation_gain", "foreign_gain", "shuffled_gain", "filler_gain", "training_gain")
INTERVALS = ("divergence", *GAINS, "coherence_utility_r", "within_r", "champion_direct")
NUMBERS = ("accuracy_own", "accuracy_none", "checks_reached", "checks", "cheats_caught")


def theater_row(run: str | Path) -> dict:
    """What stage 06 of one run measured on test problems: each number of ``INTERVALS`` with its ``_low`` and ``_high``
    over problems, ``NUMBERS``, and the ``seed``. Raises ``UpstreamError`` where the stage is not finished or too old."""
    record, reason = read_stage(Path(run) / "06_anti_theater")
    if record is None:
        raise UpstreamError(f"{Path(run).name} has no anti-theater numbers ({reason}); make them with "
                            f"`make run RUN={Path(run).name}`")  # fmt: skip
    keys = [f"{name}{end}" for name in INTERVALS for end in ("", "_low", "_high")] + list(NUMBERS)
    missing = [k for k in keys if k not in record["summary"]]
    if missing:
        raise UpstreamError(f"{Path(run).name} was made by an older version, without {missing[0]}; make its stage 06 again")
    return {"seed": record["seed"]} | {k: record["summary"][k] for k in keys}


def over_seeds(runs: list[str | Path]) -> dict:
    """One row for several runs: of each number of ``INTERVALS`` the mean over seeds with a t interval (``_low``,
    ``_high``), the smallest value (``_min``) and the smallest lower end over problems (``_min_low``: above 0 means
    that every single run showed it), and the ``seeds``. Raises ``ValueError`` below two runs, or if two have one seed.
    """
    rows = [theater_row(run) for run in runs]
    seeds = sorted(r["seed"] for r in rows)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs repeat a seed: {seeds}")
    out = {"seeds": seeds}
    for name in INTERVALS:
        values = [r[name] for r in rows]
        mean, low, high = seed_interval(values)
        out |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        out |= {f"{name}_min": min(values), f"{name}_min_low": min(r[f"{name}_low"] for r in rows)}
    return out
