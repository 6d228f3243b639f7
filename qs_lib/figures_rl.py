"""Figures of notebooks 05 to 08. Each function returns a matplotlib Figure; marks differ by shape, not only by colour."""

import os
import time

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.ticker import MaxNLocator

from .stats import interval, pearson

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
PANELS = (
    ("reward", "reward (nats)"), ("validation_accuracy", "validation accuracy (share)"),
    ("no_thought_weight", "weight of no thought (share)"), ("kl", "KL to the baked model (nats)"),
    ("length", "length (tokens)"), ("entropy", "entropy (nats per token)"), ("diversity", "different answers per problem"),
    ("max_logit", "largest attention logit"),
)  # fmt: skip


def _finished(figure):
    plt.close(figure)  # shown once, as the value of its cell
    return figure


def smooth(values, window: int) -> np.ndarray:
    """Mean of each value and up to ``window`` - 1 before it."""
    values = np.asarray(values, float)
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def first_and_last(rows: list[dict], key: str) -> tuple[float, float]:
    """Mean of ``key`` over the first and over the last tenth of the rows that have it (at least one row)."""
    values = [r[key] for r in rows if key in r]
    n = max(1, len(values) // 10)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def training_curves(live: list[dict], pocket: list[dict] = ()):
    """Curves of RL: this run's (solid, circles) and the committed pocket run's (dashed), where there is one."""
    figure, axes = plt.subplots(2, 4, figsize=(14, 5.5), layout="constrained")
    for axis, (key, label) in zip(axes.flat, PANELS, strict=True):
        for rows, name, colour, style in ((pocket, "pocket run", GREY, "--"), (live, "this run", BLUE, "-")):
            points = [(r["step"], r[key]) for r in rows if key in r]
            if points:
                steps, values = zip(*points, strict=True)
                dense = len(values) > 40
                axis.plot(steps, smooth(values, 10) if dense else values, style, color=colour, ms=4,
                          marker="o" if style == "-" else "s", markevery=max(1, len(values) // 12),
                          label=name + (" (mean of 10)" if dense else ""))  # fmt: skip
        axis.set(xlabel="RL step", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if live or pocket:
        axes[0, 0].legend(fontsize=8)
    return _finished(figure)


def live_curves(log, every: float = 3.0):
    """A function that passes metrics on to ``log`` and, in JupyterLab, redraws :func:`training_curves` while training runs.

    Nothing is drawn where nobody watches: by papermill, nbconvert or tests.
    """
    if "JPY_SESSION_NAME" not in os.environ:
        return log
    rows, drawn = [], time.monotonic()
    handle = display(training_curves([]), display_id=True)

    def both(**metrics):
        nonlocal drawn
        log(**metrics)
        rows.append(metrics)
        if time.monotonic() - drawn > every:
            handle.update(training_curves(rows))
            drawn = time.monotonic()

    return both


def _bars(axis, positions, intervals, label, colour, hatch, width):
    axis.bar(positions, [m for m, _, _ in intervals], width, yerr=_spread(intervals), capsize=3, label=label, color=colour, hatch=hatch,
             edgecolor="white", error_kw={"ecolor": "black", "lw": 1})  # fmt: skip


def _spread(intervals) -> np.ndarray:
    """(2, n) distances of (mean, low, high) from their ends; rounding must not make them negative."""
    mean, low, high = np.array(intervals, float).T
    return np.maximum([mean - low, high - mean], 0)


def accuracy_by_difficulty(problems: list[dict], before, after):
    """Exact match per number of worked steps before and after RL (arrays over problems), 95 % intervals."""
    levels = sorted({p["difficulty"] for p in problems})
    difficulty = np.array([p["difficulty"] for p in problems])
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    at = np.arange(len(levels))
    for shift, values, label, colour, hatch in ((-0.2, before, "baked", GREY, "//"), (0.2, after, "after RL", BLUE, "")):
        _bars(axis, at + shift, [interval(values[difficulty == n]) for n in levels], label, colour, hatch, 0.38)
    axis.set(xlabel="worked steps a problem needs", ylabel="accuracy with thoughts (share)", ylim=(0, 1.02))
    axis.set_xticks(at, [f"{n}\n({(difficulty == n).sum()})" for n in levels])
    axis.legend()
    return _finished(figure)


def attacks(reports: dict):
    """Accuracy under each attack, one group of bars per named TheaterReport, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    names = list(next(iter(reports.values())).accuracy)
    at, width = np.arange(len(names)), 0.8 / len(reports)
    looks = ((BLUE, ""), (GREY, "//"), (ORANGE, ".."))
    for i, ((label, report), (colour, hatch)) in enumerate(zip(reports.items(), looks, strict=False)):
        shift = (i - (len(reports) - 1) / 2) * width
        _bars(axis, at + shift, [report.accuracy[n] for n in names], label, colour, hatch, width * 0.95)
    axis.set(xlabel="thoughts the model is given", ylabel="accuracy (share)", ylim=(0, 1.02))
    axis.set_xticks(at, [n.replace("_", "\n") for n in names])
    axis.legend()
    return _finished(figure)


def coherence_scatter(table: list[dict]):
    """Utility of single thoughts against their coherence and each of its parts, with r; one dot per thought."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharey=True)
    utility = np.array([row["utility"] for row in table])
    for axis, name in zip(axes, ("composite", "semantic", "syntactic", "predictive"), strict=True):
        score = np.array([row["coherence"][name] for row in table])
        axis.plot(score, utility, "o", ms=3, alpha=0.5, color=BLUE if name == "composite" else GREY)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set(xlabel=f"{name} (0 to 1)", title=f"r = {pearson(score, utility):.2f}", xlim=(-0.03, 1.03))
    axes[0].set_ylabel("utility (nats)")
    return _finished(figure)


def latency(rows: list[dict], target_ms: float):
    """Median (mark) and 95th percentile (whisker) of a forward pass with thoughts by number and length of thoughts."""
    figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    groups = sorted({(r["positions"], r["thought_length"]) for r in rows})
    for (positions, length), marker, colour in zip(groups, "os^Dv<>P", [BLUE, GREY, ORANGE, "black"] * 2, strict=False):
        kept = sorted((r for r in rows if (r["positions"], r["thought_length"]) == (positions, length)),
                      key=lambda r: r["num_thoughts"])  # fmt: skip
        n, median = [r["num_thoughts"] for r in kept], np.array([r["median_ms"] for r in kept])
        p95 = np.array([r["p95_ms"] for r in kept])
        axis.errorbar(n, median, yerr=[0 * median, np.maximum(p95 - median, 0)], marker=marker, capsize=3, color=colour,
                      label=f"{positions} position{'s' * (positions > 1)}, up to {length} tokens")  # fmt: skip
    axis.axhline(target_ms, color="black", ls="--", lw=1, label=f"target {target_ms:g} ms")
    axis.set(xlabel="thoughts per position", ylabel="forward pass (ms), median to 95th percentile", ylim=(0, None))
    axis.legend(fontsize=8)
    return _finished(figure)


def model_latency(rows: list[dict], target_ms: float):
    """Rows of ``latency.measure_models``: left, median to 95th percentile by setting; right, what each setting of the
    longest text is made of (shares of the median)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    models = list(dict.fromkeys(r["model"] for r in rows))
    for model, marker, colour in zip(models, "os^D", (BLUE, GREY, ORANGE, "black"), strict=False):
        own = [r for r in rows if r["model"] == model]
        median, p95 = (np.array([r[key] for r in own]) for key in ("median_ms", "p95_ms"))
        left.errorbar(range(len(own)), median, yerr=[0 * median, np.maximum(p95 - median, 0)], fmt=marker, ms=6, capsize=3,
                      color=colour, label=f"{model} parameters")  # fmt: skip
    own = [r for r in rows if r["model"] == models[0]]
    names = [f"L{r['text_length']} {r['positions']}x{r['num_thoughts']}x{r['thought_length']}" for r in own]
    left.set_xticks(range(len(own)), names, rotation=40, ha="right", fontsize=8)
    left.axhline(target_ms, color="black", ls="--", lw=1, label=f"target {target_ms:g} ms")
    left.set(yscale="log", ylabel="forward pass (ms)", xlabel="text length, positions x thoughts x tokens")
    left.legend(fontsize=8)
    shown = [r for r in rows if r["text_length"] == max(r["text_length"] for r in rows)]
    below = np.zeros(len(shown))
    for part, colour, hatch in zip(shown[0]["shares"], (GREY, ORANGE, "white", BLUE), ("//", "..", "xx", ""), strict=True):
        share = np.array([r["shares"][part] for r in shown])
        right.barh(range(len(shown)), share, left=below, color=colour, hatch=hatch, edgecolor="black", lw=0.5, label=part)
        below += share
    right.set_yticks(range(len(shown)), [f"{r['model']} {r['positions']}x{r['num_thoughts']}x{r['thought_length']}" for r in shown],
                     fontsize=8)  # fmt: skip
    right.invert_yaxis()
    right.set(xlabel=f"share of the median, text of {shown[0]['text_length']} tokens", xlim=(0, 1))
    right.legend(fontsize=8, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _finished(figure)


def ladder(steps: dict[str, tuple]):
    """Accuracy (value, low, high) of each stage of the workbook; low and high may be None."""
    figure, axis = plt.subplots(figsize=(7.5, 0.6 + 0.5 * len(steps)), layout="constrained")
    for i, (label, (value, low, high)) in enumerate(steps.items()):
        if value is None:
            axis.text(0.01, i, "not measured", va="center")
            continue
        axis.barh(i, value, 0.6, color=BLUE if "RL" in label else GREY, hatch="" if "RL" in label else "//",
                  edgecolor="white")  # fmt: skip
        if low is not None:
            axis.errorbar(value, i, xerr=_spread([(value, low, high)]), color="black", capsize=3)
        axis.text(0.01, i, f"{value:.3f}", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.set_yticks(range(len(steps)), list(steps))
    axis.invert_yaxis()
    axis.set(xlabel="exact match on test problems (share)", xlim=(0, 1.0))
    return _finished(figure)
