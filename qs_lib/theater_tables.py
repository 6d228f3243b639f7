"""Tables of notebook 06, from ``TheaterReport``s: verdicts, parts of coherence, stages, cheats, and the stage's summary."""

import pandas as pd

from .evaluation.episodes import by_problem
from .evaluation.theater import CHECKS, TheaterReport
from .stats import correlation, fixed, named, shown


def verdicts(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """Every check against its target for each model, its outcome in words; "not made" where a model lacks it."""
    columns = {name: {c.id: f"{_value(c)} {_outcome(c)}" for c in one.checks} for name, one in reports.items()}
    targets = {c.id: c.target for one in reports.values() for c in one.checks}
    return pd.DataFrame({"target": targets, **columns}).reindex([i for i in CHECKS if i in targets]).fillna("not made")


def parts(report: TheaterReport, seed: int = 0) -> pd.DataFrame:
    """Correlation with utility of coherence and of each part of it, pooled and inside problems, with intervals."""
    utility, rows = by_problem(report.table, "utility"), {}
    for name in ("composite", "semantic", "syntactic", "predictive"):
        score = by_problem(report.table, name)
        rows[name] = {"pooled r": shown(correlation(score, utility, seed), signed=True),
                      "within problems": shown(correlation(score, utility.clip(-5, 5), seed, within=True), signed=True)}  # fmt: skip
    return pd.DataFrame(rows).T


def reliabilities(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """Calibration error and preference for right thoughts of each score of each model."""
    rows = {(model, score): {"calibration error": shown(r.error), "right before wrong": shown(r.preference),
                              "problems with both": r.disputed}
            for model, one in reports.items() for score, r in one.reliability.items()}  # fmt: skip
    return pd.DataFrame(rows).T


def stages(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """The models side by side, in the order given: what each stage of training adds."""
    columns = {}
    for name, one in reports.items():
        made = {c.id: _value(c) for c in one.checks}
        columns[name] = {
            "accuracy with own thoughts": shown(one.accuracy["own"]), "without thoughts": shown(one.accuracy["none"]),
            "own minus none": made["ablation_gain"], "own minus foreign": made["foreign_gain"],
            "coherence against utility, r": made["coherence_utility_r"], "the same within problems": shown(one.within_r),
            "distance between thoughts": fixed(one.diversity[0]),
            "gain over the stage before": made.get("training_gain", "-"),
            "checks reached": f"{len(one.checks) - len(one.missed)} of {len(one.checks)}",
        }  # fmt: skip
    return pd.DataFrame(columns)


def turned_red(planted: TheaterReport, honest: TheaterReport) -> list[str]:
    """Ids of the checks that a planted cheat misses and the honest model passes: what caught it."""
    passed = {c.id for c in honest.checks if c.reached}
    return [i for i in planted.missed if i in passed]


def summary(report: TheaterReport) -> dict[str, float]:
    """The numbers of a report for the stage's ``run.json``, those with an interval as ``name``, ``_low``, ``_high``."""
    out = {}
    for c in report.checks:
        out |= named(c.id, (c.value, c.low, c.high))
    out |= {f"accuracy_{attack}": value[0] for attack, value in report.accuracy.items()}
    for name in ("within_r", "diversity", "matched_divergence"):
        out |= named(name, getattr(report, name))
    for name, one in report.reliability.items():
        out |= named(f"{name}_calibration_error", one.error) | named(f"{name}_preference", one.preference)
    return out | {"checks_reached": len(report.checks) - len(report.missed), "checks": len(report.checks)}


def _value(check) -> str:
    return shown((check.value, check.low, check.high))


def _outcome(check) -> str:
    return "reached" if check.reached else "open" if check.undecided else "not reached"
