"""Intervals, correlation, calibration, and numbers as text.

Intervals are 95 %: bootstraps over problems, or Student's t over seeds.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

Interval = tuple[float, float, float]  # value, low, high


@dataclass
class Reliability:
    """What :func:`reliability` found.

    ``bins``: per bin of the score its mean ``score``, the share ``right`` with ``low`` and ``high``, and the ``count``
    of thoughts. ``disputed``: number of problems with right and wrong thoughts, which alone make the ``preference``.
    """

    bins: list[dict]
    error: Interval
    preference: Interval
    disputed: int


def pearson(x, y) -> float:
    """Return Pearson's r of two arrays of one shape, 0 where one of the two is constant."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1]) if np.ptp(x) > 1e-12 and np.ptp(y) > 1e-12 else 0.0


def correlation(x, y, seed: int = 0, resamples: int = 1000, within: bool = False) -> Interval:
    """Return :func:`pearson` over single thoughts, with its interval. ``x`` and ``y`` are (problems, K).

    ``within``: both are taken relative to their problem's mean, so that easy and hard problems cannot help, and ``y``
    then counts 5 at most either way: how far a thought misleads says little, in nats of a long answer even less.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if within:
        x, y = x - x.mean(1, keepdims=True), (y - y.mean(1, keepdims=True)).clip(-5, 5)
    return pearson(x, y), *middle([pearson(x[i], y[i]) for i in resampled(len(x), seed, resamples)])


def reliability(score, right, bins: int = 10, seed: int = 0, resamples: int = 1000) -> Reliability:
    """Compare a score of thoughts with whether they are right: calibration, and preference within a problem.

    ``score`` in [0, 1] and ``right`` (0 or 1) are (problems, K). Expected calibration error: the mean over thoughts of
    |mean score - share right| of their bin (equal widths). A score that is no probability has a large one, and few
    thoughts make it too large by chance. ``preference``: of all pairs of a right and a wrong thought of one problem,
    the share in which the right one scores higher (ties count half), 0.5 by chance and (0.5, 0, 1) without any pair.
    """
    score, right = np.asarray(score, float), np.asarray(right, float)
    inside = np.minimum((score * bins).astype(int), bins - 1)[..., None] == np.arange(bins)  # (problems, K, bins)
    sums = np.stack([inside.sum(1), (score[..., None] * inside).sum(1), (right[..., None] * inside).sum(1)])
    both = (right[:, :, None] > right[:, None, :]).astype(float)  # pairs of a right and a wrong thought
    gap = score[:, :, None] - score[:, None, :]
    wins, pairs = (both * ((gap > 0) + 0.5 * (gap == 0))).sum((1, 2)), both.sum((1, 2))  # (problems,)
    times = np.stack([np.bincount(i, minlength=len(score)) for i in resampled(len(score), seed, resamples)])
    count, total, hits = times @ sums  # each (resamples, bins)
    errors = np.abs(total - hits).sum(1) / score.size
    with np.errstate(invalid="ignore"):
        shares = hits / count
    n, s, h = sums.sum(1)
    rows = []
    for b in np.flatnonzero(n):
        low, high = middle(shares[:, b])
        rows.append({"score": s[b] / n[b], "right": h[b] / n[b], "low": low, "high": high, "count": int(n[b])})
    preference = (0.5, 0.0, 1.0)
    if pairs.sum():
        again = times @ pairs
        preference = (float(wins.sum() / pairs.sum()), *middle((times @ wins)[again > 0] / again[again > 0]))
    error = (float(np.abs(s - h).sum() / score.size), *middle(errors))
    return Reliability(rows, error, preference, int((pairs > 0).sum()))


def votes(weights, answers: list[list[str]]) -> np.ndarray:
    """Return the weight (problems, K) the mixture gives to each thought's answer, all branches that agree together.

    ``weights`` and ``answers`` are (problems, 1 + K), "no thought" first. Unlike a single weight this is a
    probability: what the mixture says about an answer.
    """
    agree = np.array([[[a == b for b in row] for a in row[1:]] for row in answers])
    return np.minimum((agree * np.asarray(weights, float)[:, None]).sum(-1), 1.0)


def resampled(problems: int, seed: int, resamples: int) -> np.ndarray:
    """Return indices (resamples, problems) of bootstraps over problems."""
    return np.random.default_rng(seed).integers(0, problems, (resamples, problems))


def middle(values, ends: tuple[float, float] = (0.025, 0.975)) -> tuple[float, float]:
    """Return the quantiles that enclose the middle 95 % of resampled values, NaN left out."""
    low, high = np.nanquantile(values, ends)
    return float(low), float(high)


def interval(values, seed: int = 0, resamples: int = 2000) -> Interval:
    """Return the mean with a percentile bootstrap over problems. ``values``: (problems,) or (problems, repeats).

    Repeats (thoughts of one problem) are averaged first, so that the problem stays the unit of resampling.
    """
    values = np.asarray(values, dtype=float)
    values = values.reshape(len(values), -1).mean(1)
    means = values[resampled(len(values), seed, resamples)].mean(1)
    ends = ((1 - 0.95) / 2, 0.975)  # not quite 0.025: committed numbers are to the bit
    return float(values.mean()), *middle(means, ends)


def seed_interval(values) -> Interval:
    """Return the mean with Student's t interval over seeds, for what another seed would give on average.

    Not over problems: the test problems are the same for all. Raises ``ValueError`` if there are fewer than two seeds.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def column(rows: list[dict], arm: str, key: str) -> list[float]:
    """Return one number of an arm's rows, ordered by seed, so that arms can be subtracted seed by seed."""
    return [row[key] for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == arm]


def difference(rows: list[dict], arm: str, control: str, key: str) -> Interval:
    """Return ``arm`` minus ``control``, paired by seed, with :func:`seed_interval`.

    Raises ``ValueError`` unless both were run on the same seeds and, where rows name it, the same ``data``: the run
    they read from may have been made anew between two rows.
    """
    ran = [sorted((r["seed"], r.get("data", "")) for r in rows if r["arm"] == name) for name in (arm, control)]
    if ran[0] != ran[1]:
        raise ValueError(f"{arm} and {control} were not run on the same seeds and data")
    return seed_interval(np.subtract(column(rows, arm, key), column(rows, control, key)))


def named(prefix: str, value: Interval) -> dict[str, float]:
    """Return an interval as summary entries: ``prefix``, ``prefix_low``, ``prefix_high``."""
    return {prefix: value[0], f"{prefix}_low": value[1], f"{prefix}_high": value[2]}


def fixed(value: float, digits: int = 3, signed: bool = False) -> str:
    """Return a number with fixed decimals and no negative zero, so that rounding noise does not show."""
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"


def shown(value: Interval, signed: bool = False, digits: int = 3) -> str:
    """Return an interval for reading: ``0.812 [0.750, 0.875]``."""
    mean, low, high = (fixed(x, digits, signed) for x in value)
    return f"{mean} [{low}, {high}]"


def as_text(value, digits: int | None = None) -> str:
    """Return a float with ``digits`` decimals, or three significant digits, and a count or a word in full."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if digits is None else fixed(value, digits)


def over_seeds(values: list[float | None], signed: bool = False) -> str:
    """Return a mean with its interval over seeds, or the one number there is, for reading."""
    values = [v for v in values if v is not None]
    if len(values) > 1:
        return shown(seed_interval(values), signed)
    return fixed(values[0], 3, signed) if values else ""
