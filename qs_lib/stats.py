"""Intervals, correlation, calibration, and numbers as text.

Intervals are 95 %: bootstraps over problems, or Student's t over seeds.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass
class Reliability:
    """``bins``: per bin of the score its mean ``score``, the share ``right`` with ``low`` and ``high``, and the
    ``count`` of thoughts; ``error``: expected calibration error; ``preference``: see :func:`reliability`, both as
    (value, low, high); ``disputed``: number of problems with right and wrong thoughts, which alone make it."""

    bins: list[dict]
    error: tuple[float, float, float]
    preference: tuple[float, float, float]
    disputed: int


def correlation(x, y, seed: int = 0, resamples: int = 1000, within: bool = False) -> tuple[float, float, float]:
    """Pearson r over single thoughts as (value, low, high); 0 if either is constant.

    ``within``: both are taken relative to their problem's mean, so that easy and hard problems cannot help.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if within:
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)

    def r(a, b):
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if np.ptp(a) > 1e-12 and np.ptp(b) > 1e-12 else 0.0

    low, high = np.quantile([r(x[i], y[i]) for i in _resampled(len(x), seed, resamples)], [0.025, 0.975])
    return r(x, y), float(low), float(high)


def reliability(score, right, bins: int = 10, seed: int = 0, resamples: int = 1000) -> Reliability:
    """Is a thought of score s right in a share s of cases, and does the score prefer right thoughts to wrong ones?

    ``score`` in [0, 1] and ``right`` (0 or 1), both (problems, K). Expected calibration error: the mean over thoughts
    of |mean score - share right| of their bin (equal widths); a score that means something else than a probability
    has a large one. With few thoughts it is too large by chance. ``preference``: of all pairs of a right and a wrong
    thought of one problem, the share in which the right one scores higher (ties count half): 0.5 is chance. Without
    any pair nothing is known: (0.5, 0, 1).
    """
    score, right = np.asarray(score, float), np.asarray(right, float)
    inside = np.minimum((score * bins).astype(int), bins - 1)[..., None] == np.arange(bins)
    sums = np.stack([inside.sum(1), (score[..., None] * inside).sum(1), (right[..., None] * inside).sum(1)])
    wins, pairs = _pairs(score, right)
    times = np.stack([np.bincount(i, minlength=len(score)) for i in _resampled(len(score), seed, resamples)])
    count, total, hits = times @ sums  # each (resamples, bins)
    errors = np.abs(total - hits).sum(1) / score.size
    with np.errstate(invalid="ignore"):
        shares = hits / count
    n, s, h = sums.sum(1)
    rows = [
        {"score": s[b] / n[b], "right": h[b] / n[b], "low": float(low), "high": float(high), "count": int(n[b])}
        for b in np.flatnonzero(n)
        for low, high in [np.nanquantile(shares[:, b], [0.025, 0.975])]
    ]
    preference = (0.5, 0.0, 1.0)
    if pairs.sum():
        again = times @ pairs
        ratios = (times @ wins)[again > 0] / again[again > 0]
        preference = (float(wins.sum() / pairs.sum()), *map(float, np.quantile(ratios, [0.025, 0.975])))
    low, high = np.quantile(errors, [0.025, 0.975])
    return Reliability(
        rows, (float(np.abs(s - h).sum() / score.size), float(low), float(high)), preference, int((pairs > 0).sum())
    )


def votes(weights, answers: list[list[str]]) -> np.ndarray:
    """The weight the mixture gives to each thought's answer: its own and that of all branches that agree with it.

    ``weights`` (problems, 1 + K) and ``answers`` (problems, 1 + K), "no thought" first -> (problems, K). Unlike a single
    weight this is a probability: what the mixture says about an answer.
    """
    agree = np.array([[[a == b for b in row] for a in row[1:]] for row in answers])
    return np.minimum((agree * np.asarray(weights, float)[:, None]).sum(-1), 1.0)


def _pairs(score, right):
    """Per problem, won and all pairs of a right and a wrong thought."""
    both = (right[:, :, None] > right[:, None, :]).astype(float)
    difference = score[:, :, None] - score[:, None, :]
    return (both * ((difference > 0) + 0.5 * (difference == 0))).sum((1, 2)), both.sum((1, 2))


def _resampled(problems: int, seed: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, problems, (resamples, problems))


def interval(values, confidence: float = 0.95, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over problems. ``values``: (problems,) or (problems, repeats), where
    repeats (thoughts of one problem) are averaged first so that the problem stays the unit of resampling."""
    values = np.asarray(values, dtype=float)
    values = values.reshape(len(values), -1).mean(1)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean()), float(low), float(high)


def named(prefix: str, value: tuple[float, float, float]) -> dict[str, float]:
    """An interval as summary entries: ``prefix``, ``prefix_low``, ``prefix_high``."""
    return {prefix: value[0], f"{prefix}_low": value[1], f"{prefix}_high": value[2]}


def shown(value: tuple[float, float, float], signed: bool = False, digits: int = 3) -> str:
    """An interval for reading: ``0.812 [0.750, 0.875]``."""
    mean, low, high = (fixed(x, digits, signed) for x in value)
    return f"{mean} [{low}, {high}]"


def fixed(value: float, digits: int = 3, signed: bool = False) -> str:
    """A number with fixed decimals and no negative zero, so that rounding noise does not show."""
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"


def seed_interval(values, confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): Student's t interval over seeds, for what another seed would give on average.

    Not over problems: the test problems are the same for all. Raises ``ValueError`` below two seeds.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def column(rows: list[dict], arm: str, key: str) -> list[float]:
    """One number of an arm's rows, ordered by seed, so that arms can be subtracted seed by seed."""
    return [row[key] for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == arm]


def difference(rows: list[dict], arm: str, control: str, key: str) -> tuple[float, float, float]:
    """``arm`` minus ``control``, paired by seed, with :func:`seed_interval`.

    Raises ``ValueError`` unless both were run on the same seeds and on the same ``data``, where rows name them: the
    run they read from may have been made anew between two rows.
    """
    ran = [sorted((r["seed"], r.get("data", "")) for r in rows if r["arm"] == name) for name in (arm, control)]
    if ran[0] != ran[1]:
        raise ValueError(f"{arm} and {control} were not run on the same seeds and data")
    return seed_interval(np.subtract(column(rows, arm, key), column(rows, control, key)))


def pearson(x, y) -> float:
    """Correlation, 0 where one of the two is constant."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0
