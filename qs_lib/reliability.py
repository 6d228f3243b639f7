"""How far a score of thoughts can be believed: correlation with utility, calibration, preference for right thoughts.

Everything is given per problem and thought, (problems, K); intervals are 95 % bootstraps over problems.
"""

from dataclasses import dataclass

import numpy as np


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
    return Reliability(rows, (float(np.abs(s - h).sum() / score.size), float(low), float(high)), preference,
                       int((pairs > 0).sum()))  # fmt: skip


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
