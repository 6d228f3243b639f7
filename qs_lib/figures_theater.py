"""Figures of notebook 06. Each function returns a matplotlib Figure; marks differ by shape, not only by colour."""

import matplotlib.pyplot as plt
import numpy as np

from .stats import Reliability

BLUE, GREY = "#0072B2", "#666666"


def reliability(scores: dict[str, Reliability]):
    """Share of right thoughts per bin of each score (mark, 95 % interval; a larger mark for more thoughts) against the
    score; on the dotted line a score would be the probability of being right."""
    figure, axes = plt.subplots(1, len(scores), figsize=(4 * len(scores), 3.8), layout="constrained", sharey=True)
    for axis, (name, one) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        x, y, low, high, count = np.array([[b[k] for k in ("score", "right", "low", "high", "count")] for b in one.bins]).T
        axis.plot([0, 1], [0, 1], ":", color="black", lw=1)
        axis.errorbar(x, y, yerr=np.maximum([y - low, high - y], 0), fmt="none", ecolor=GREY, capsize=3)
        axis.scatter(x, y, s=15 + 150 * count / count.sum(), marker="o", color=BLUE)
        axis.set(xlabel=f"{name} (0 to 1)", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
                 title=f"calibration error {one.error[0]:.2f}\nright before wrong {one.preference[0]:.2f}")  # fmt: skip
        axis.title.set_fontsize(10)
    np.atleast_1d(axes)[0].set_ylabel("thoughts that lead to the right answer (share)")
    plt.close(figure)  # shown once, as the value of its cell
    return figure
