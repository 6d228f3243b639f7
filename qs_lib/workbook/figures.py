"""The figures of all notebooks. Each function returns a matplotlib Figure. Marks differ in shape as well as colour."""

import os
import time
from collections import namedtuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Pretty, display
from matplotlib.ticker import MaxNLocator

from ..stats import Reliability, interval, pearson
from ..viewing import doctor
from ..viewing.escape import safe_label
from ..viewing.html import BLUE, GREY, ORANGE, PARTS

Look = namedtuple("Look", "colour dash marker hatch")  # how one series is told from the others
LOOKS = (
    Look(BLUE, "-", "o", ""),
    Look(GREY, "--", "s", "//"),
    Look(ORANGE, "-.", "^", ".."),
    Look("black", ":", "D", "xx"),
)
PANELS = {
    "reward": "reward (nats)",
    "validation_accuracy": "validation accuracy (share)",
    "no_thought_weight": "weight of no thought (share)",
    "kl": "KL to the baked model (nats)",
    "length": "length (tokens)",
    "entropy": "entropy (nats per token)",
    "diversity": "different answers per problem",
    "max_logit": "largest attention logit",
}


def new_figure(width: float = 6.4, height: float = 3.4, columns: int = 1, rows: int = 1, dpi: int = 90, **shared):
    """Return (figure, axes), ``width`` x ``height`` inches. ``shared``: what ``plt.subplots`` takes (``sharey``)."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), dpi=dpi, layout="constrained", **shared)
    plt.close(figure)  # shown once, as the value of its cell
    return figure, axes


def _draw_line(axis, points: list[tuple], look: Look, label: str | None) -> None:
    """Draw (x, y) points as a line with at most a dozen or two marks, and nothing if there are none."""
    if points:
        drawn = {"color": look.colour, "marker": look.marker, "markevery": max(1, len(points) // 12), "ms": 5}
        axis.plot(*zip(*points, strict=True), look.dash, label=label, **drawn)


def draw_band(axis, x, intervals, look: Look, label: str) -> None:
    """Draw (mean, low, high) over ``x``: a line through the means, and a band from low to high."""
    mean, low, high = np.array(list(intervals)).T
    axis.plot(x, mean, look.dash, color=look.colour, marker=look.marker, ms=5, label=label)
    axis.fill_between(x, low, high, color=look.colour, alpha=0.15, lw=0)


def _bars(axis, series: dict[str, list], names: list[str], looks=LOOKS) -> None:
    """Draw a group of bars per name, one bar per series: its values, or (mean, low, high) with whiskers."""
    width = 0.8 / len(series)
    for i, ((label, values), look) in enumerate(zip(series.items(), looks, strict=False)):
        style, heights = {"color": look.colour, "hatch": look.hatch, "edgecolor": "white"}, np.array(values, float)
        if heights.ndim == 2:
            style |= {"yerr": _spread(heights), "capsize": 3, "error_kw": {"ecolor": "black", "lw": 1}}
            heights = heights[:, 0]
        at = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
        axis.bar(at, heights, width * 0.95, label=label, **style)
    axis.set_xticks(range(len(names)), names)


def _spread(intervals) -> np.ndarray:
    """Distances (2, n) of (mean, low, high) from their ends. Rounding must not make them negative."""
    mean, low, high = np.array(intervals, float).T
    return np.maximum([mean - low, high - mean], 0)


def finish(axis, grid: bool = False, legend: dict | None = None, **labels) -> None:
    """Give an axis its labels and limits, and a small legend."""
    axis.set(**labels)
    if grid:
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, **legend or {})


def idea():
    """Draw Quiet-STaR: thoughts branch off after a token, and their predictions are mixed with the plain one."""
    figure, axes = new_figure(9.0, 3.2)
    axes.set(xlim=(0, 12), ylim=(0.2, 4.6))
    axes.axis("off")

    def box(x, y, text, colour, style="round"):
        frame = {"boxstyle": f"{style},pad=0.3", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5}
        axes.text(x, y, text, ha="center", va="center", family="monospace", fontsize=9, bbox=frame)

    def arrow(start, end, style="-"):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY, "linestyle": style})

    for x, word in zip((0.5, 1.3, 2.1, 2.9), ("how", "many", "pens", "?"), strict=True):
        box(x, 2, word, "black")
    thoughts = ("<think> <step> 9 + 8 = 17 </think>", "<think> <mece> 9 8 <step> ... </think>")
    for y, text in zip((3.7, 2.7), thoughts, strict=True):
        box(6.3, y, text, BLUE)
        arrow((3.2, 2.1), (4.2, y))
        arrow((8.5, y), (9.7, 2.2))
    box(6.3, 1.2, "no thought", GREY, "square")
    arrow((3.2, 1.9), (5.6, 1.2), "--")
    arrow((7.0, 1.2), (9.7, 1.8), "--")
    box(10.2, 2, "mixing\nhead", ORANGE)
    arrow((10.8, 2), (11.3, 2))
    box(11.6, 2, "17", "black")
    notes = {(1.7, 0.9): "text so far", (6.3, 4.35): "K thoughts, sampled in parallel"}
    notes |= {(6.3, 0.5): "what it would have said", (10.6, 0.5): "p = w₀ p₀ + Σ wₖ pₖ"}
    for place, text in notes.items():
        axes.text(*place, text, ha="center", fontsize=9, style="italic")
    return figure


def curves(runs: dict[str, list[dict]], x: str, panels: dict[str, str], xlabel: str):
    """Draw one panel per key of ``panels`` (key -> axis label with unit) against ``x``, one line per run with rows."""
    figure, axes = new_figure(max(5.6, 3.6 * len(panels)), 3.2, len(panels))
    for axis, (key, label) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for (name, rows), look in zip(runs.items(), LOOKS, strict=False):
            _draw_line(axis, [(r[x], r[key]) for r in rows if key in r and x in r], look, name)
        axis.set(xlabel=xlabel, ylabel=label)
        axis.grid(alpha=0.3)
    if any(runs.values()):
        np.atleast_1d(axes)[0].legend(fontsize=8)
    return figure


def lines(series: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, log: bool = False):
    """Draw one line of (x, y) points per name. The last is the one in blue. ``log``: logarithmic x axis."""
    figure, axis = new_figure(6.8, 3.4)
    for (name, points), look in zip(series.items(), LOOKS[len(series) - 1 :: -1], strict=True):
        _draw_line(axis, points, look, name)
    finish(axis, grid=True, xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    return figure


def sweep_panels(rows: list[dict], x: str, ys: list[str], parameters: list[str]):
    """Draw a panel per number of ``ys``: a mark per row, and a line of means per combination of ``parameters``."""
    figure, axes = new_figure(max(5.6, 4.2 * len(ys)), 3.4, len(ys))
    groups = {}
    for row in rows:
        groups.setdefault(", ".join(f"{name} {row[name]}" for name in parameters), []).append(row)
    for axis, y in zip(np.atleast_1d(axes), ys, strict=True):
        for i, (name, group) in enumerate(groups.items()):
            shape = LOOKS[(i + i // 4) % 4]  # neighbours differ in colour, dash and marker, and so do sixteen lines
            look = shape._replace(colour=LOOKS[i % 4].colour)
            points = [(r[x], r[y]) for r in group if isinstance(r.get(y), (int, float))]
            means = list(pd.DataFrame(points).groupby(0, sort=False)[1].mean().items()) if points else []
            _draw_line(axis, means, look, safe_label(name) or "mean")
            axis.plot([p for p, _ in points], [value for _, value in points], ".", color=look.colour, ms=3, alpha=0.6)
        finish(axis, grid=True, xlabel=safe_label(x), ylabel=safe_label(y))
    return figure


def row_norms(real: list[float], new: dict[str, float]):
    """Draw a histogram of the norms of the rows a model has, with each new row marked and named."""
    figure, axis = new_figure(6.8, 3.2)
    counts, _, _ = axis.hist(real, bins=30, color=GREY, alpha=0.7, label=f"{len(real)} rows it had")
    axis.set_ylim(0, counts.max() * 2.2)
    beside = {"xytext": (7, -3), "textcoords": "offset points", "fontsize": 8, "family": "monospace"}
    for i, (token, norm) in enumerate(new.items()):
        height = counts.max() * (2.08 - 0.13 * i)
        axis.plot([norm], [height], "v", color=ORANGE, label="8 new rows" if i == 0 else None)
        axis.annotate(token, (norm, height), **beside)
    axis.set(xlabel="length of the embedding row (Euclidean norm)", ylabel="rows (count)")
    finish(axis, legend={"loc": "center right"})
    return figure


def difficulty_shares(splits: dict[str, list[int]]):
    """Draw the share of each split's problems by number of worked steps (``splits``: name -> difficulties)."""
    figure, axis = new_figure()
    levels = sorted({min(d, 9) for ds in splits.values() for d in ds})
    shares = {name: [np.mean([min(d, 9) == n for d in ds]) for n in levels] for name, ds in splits.items()}
    _bars(axis, shares, [f"{n} or more" if n == 9 else str(n) for n in levels])
    axis.set(xlabel="difficulty (worked steps)", ylabel="share of the split's problems")
    finish(axis, legend={"ncol": 3, "loc": "upper right"}, ylim=(0, 1.25 * axis.get_ylim()[1]))
    return figure


def arm_accuracies(runs: dict[str, dict[str, list[float]]], width: float = 7.2, **labels):
    """Draw the accuracy of each arm, (mean, low, high) with 95 % intervals: one group per arm, one bar per run."""
    figure, axis = new_figure(width, 3.7)
    runs = {name: values for name, values in runs.items() if values}
    arms = list(next(iter(runs.values())))
    _bars(axis, {run: [v[arm] for arm in arms] for run, v in runs.items()}, [arm.replace("_", "\n") for arm in arms])
    finish(axis, ylabel="test accuracy (share of problems)", ylim=(0, 1.02), **labels)
    return figure


def heat_map(table: dict, title="", xlabel="strategy of the reply", ylabel="family of the problem"):
    """Draw shares (row -> column -> share), dark for 1, with every number but 0 written in its cell."""
    rows, columns = list(table), list(next(iter(table.values())))
    values = np.array([[table[r][c] for c in columns] for r in rows])
    figure, axis = new_figure(min(9.5, 0.8 * len(columns) + 2.2), 0.34 * len(rows) + 2)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        colour, number = "white" if value > 0.6 else "black", f"{value:.2g}" if value else ""
        axis.text(j, i, number, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure


def diagonal_mask(seen, queries: list[str], keys: list[str]):
    """Draw which key each query reads, ``seen`` (queries, keys): a filled square with a dot where it does."""
    seen = np.asarray(seen, float)
    figure, axis = new_figure(0.3 * len(keys) + 1.6, 0.3 * len(queries) + 1.2)
    axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.6)
    axis.plot(*np.nonzero(seen > 0)[::-1], "o", ms=3, color="black")
    axis.set_xticks(range(len(keys)), [safe_label(x) for x in keys], rotation=90, fontsize=7, family="monospace")
    axis.set_yticks(range(len(queries)), [safe_label(x) for x in queries], fontsize=7, family="monospace")
    axis.set(xlabel="key (token that is read): text, or position.thought.token", ylabel="query (token that reads)")
    return figure


def bench_ratios(measured: list[dict]):
    """Draw the ratios "another way / ours" of a bench file on a log axis, each with its bound as a vertical stroke."""
    looks = {"one by one / ours": (GREY, "//"), "generate / ours": (BLUE, "")}
    looks |= {"copied prefix / ours": (ORANGE, ".."), "dense mask / ours": ("white", "xx")}
    kept = [line for line in measured if line["value"] and line["kind"] != "aim"]
    rows = [(claim, line) for claim in looks for line in kept if line["claim"] == claim]
    figure, axis = new_figure(7.6, 0.34 * len(rows) + 1.2)
    for i, (claim, line) in enumerate(rows):
        colour, hatch = looks[claim]
        axis.barh(i, line["value"], 0.7, color=colour, hatch=hatch, edgecolor="black", lw=0.5)
        axis.text(1.08 * max(line["value"], line["bound"] or 0), i, f"{line['value']:.3g}", va="center", fontsize=8)
        if line["bound"]:
            axis.plot([line["bound"]] * 2, [i - 0.42, i + 0.42], color="black", lw=2.5)
    axis.set_yticks(range(len(rows)), [f"{claim.split(' / ')[0]}, {line['shape']}" for claim, line in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="CPU time / ours (stroke: bound)", xlim=(0.7, 2 * max(x["value"] for _, x in rows)))
    return figure


def hard_positions(tokens: list[str], entropy: list[float], chosen: list[int]):
    """Draw the entropy of the next-token prediction after each token. The chosen positions are hatched and marked."""
    figure, axis = new_figure(max(7.0, 0.24 * len(tokens)), 3.2)
    picked = np.isin(np.arange(len(tokens)), chosen)
    looks = {"color": np.where(picked, ORANGE, GREY), "hatch": np.where(picked, "//", ""), "edgecolor": "white"}
    axis.bar(range(len(tokens)), entropy, **looks)
    axis.plot(np.flatnonzero(picked), np.array(entropy)[picked], "v", color="black", ms=5)
    axis.set_xticks(range(len(tokens)), [safe_label(x) for x in tokens], rotation=90, fontsize=7)
    axis.set(xlabel="token after which the model predicts (marked: think here)", ylabel="entropy (nats)")
    return figure


def look_ahead_gains(gains: list[list[float]], words: list[str]):
    """Draw the gain in log-likelihood, ``gains`` (thoughts, true tokens): one dot per thought, a bar for their mean."""
    gains = np.asarray(gains, float)
    figure, axis = new_figure(5.6, 3.2)
    axis.bar(range(gains.shape[1]), gains.mean(0), color=GREY, alpha=0.5, hatch="//", edgecolor="white", label="mean")
    for k, row in enumerate(gains):
        x = np.arange(len(row)) + 0.05 * (k - len(gains) / 2)
        axis.plot(x, row, "o", ms=5, color=BLUE, label=None if k else "one thought")
    axis.axhline(0, color="black", lw=0.8, ls=":")
    axis.set_xticks(range(len(words)), [safe_label(x) for x in words], family="monospace")
    axis.margins(y=0.1)
    finish(axis, xlabel="true tokens after the thought, in order", ylabel="gain in log-likelihood (nats)")
    return figure


def first_and_last(rows: list[dict], key: str) -> tuple[float, float]:
    """Return the mean of ``key`` over the first and over the last tenth of the rows that have it, at least one row."""
    values = [r[key] for r in rows if key in r]
    n = max(1, len(values) // 10)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def training_curves(live: list[dict], pocket: list[dict] = ()):
    """Draw the curves of RL: this run's (solid, circles) and, where there is one, the committed pocket run's (dashed).
    More than forty values are smoothed over ten."""
    figure, axes = new_figure(10.5, 5.8, 4, rows=2, dpi=100)
    for axis, (key, label) in zip(axes.flat, PANELS.items(), strict=True):
        for name, rows, look in (("pocket run", pocket, LOOKS[1]), ("this run", live, LOOKS[0])):
            points = [(r["step"], r[key]) for r in rows if key in r]
            if len(points) > 40:
                means = pd.Series(dict(points)).rolling(10, min_periods=1).mean()
                name, points = f"{name} (mean of 10)", list(means.items())
            _draw_line(axis, points, look, name)
        axis.set_title(label, fontsize=9)  # beside an axis it is too long
        axis.set_xlabel("RL step", fontsize=9)
        axis.tick_params(labelsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    if live or pocket:
        axes[0, 0].legend(fontsize=8)
    return figure


def live_curves(log, every: float = 3.0):
    """Return a function that passes metrics on to ``log`` and, in JupyterLab, redraws :func:`training_curves` every so
    many seconds, with what the training doctor says below them. Nothing is drawn where nobody watches."""
    if "JPY_SESSION_NAME" not in os.environ:
        return log
    rows, drawn = [], time.monotonic()
    handle, told = (display(first, display_id=True) for first in (training_curves([]), Pretty("")))

    def both(**metrics):
        nonlocal drawn
        log(**metrics)
        rows.append(metrics)
        if time.monotonic() - drawn > every:
            handle.update(training_curves(rows))
            told.update(Pretty("\n".join(doctor.as_lines(doctor.examine(rows)))))
            drawn = time.monotonic()

    return both


def accuracy_by_difficulty(problems: list[dict], before, after):
    """Draw exact match per number of worked steps, 95 % intervals. ``before``, ``after`` RL: (problems, ...)."""
    difficulty, runs = np.array([p["difficulty"] for p in problems]), {"baked": before, "after RL": after}
    levels = sorted(set(difficulty.tolist()))
    figure, axis = new_figure(6.5, 3.6, dpi=100)
    shares = {name: [interval(v[difficulty == n]) for n in levels] for name, v in runs.items()}
    _bars(axis, shares, [f"{n}\n({(difficulty == n).sum()})" for n in levels], LOOKS[1::-1])
    finish(axis, xlabel="worked steps a problem needs", ylabel="accuracy with thoughts (share)", ylim=(0, 1.02))
    return figure


def attacks(accuracies: dict):
    """Draw the accuracies of named models under each attack (``TheaterReport.accuracy``), with 95 % intervals."""
    return arm_accuracies(accuracies, 11, xlabel="thoughts the model is given")


def coherence_scatter(table: list[dict]):
    """Draw the utility of single thoughts against their coherence and each of its parts, with Pearson r."""
    figure, axes = new_figure(12, 3.4, 4, dpi=100, sharey=True)
    utility = np.array([row["utility"] for row in table])
    for axis, name in zip(axes, PARTS, strict=True):
        score = np.array([row["coherence"][name] for row in table])
        axis.plot(score, utility, "o", ms=3, alpha=0.5, color=BLUE if name == "composite" else GREY)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set(xlabel=f"{name} (0 to 1)", title=f"r = {pearson(score, utility):.2f}", xlim=(-0.03, 1.03))
    axes[0].set_ylabel("utility (nats)")
    return figure


def _median_to_p95(axis, x, rows: list[dict], look: Look, label: str, line: str = "") -> None:
    """Draw medians (marks) with whiskers to the 95th percentile."""
    median, p95 = (np.array([r[key] for r in rows]) for key in ("median_ms", "p95_ms"))
    style = {"fmt": look.marker + line, "color": look.colour, "label": label, "capsize": 3}
    axis.errorbar(x, median, yerr=[0 * median, np.maximum(p95 - median, 0)], **style)


def latency_by_setting(rows: list[dict], target_ms: float):
    """Draw the time of a forward pass with thoughts by number and length of thoughts: median to 95th percentile."""
    figure, axis = new_figure(7.5, 3.8, dpi=100)
    groups = {}
    for row in sorted(rows, key=lambda r: (r["positions"], r["thought_length"], r["num_thoughts"])):
        label = f"{row['positions']} position{'s' * (row['positions'] > 1)}, up to {row['thought_length']} tokens"
        groups.setdefault(label, []).append(row)
    for (label, own), look in zip(groups.items(), LOOKS * 2, strict=False):
        _median_to_p95(axis, [r["num_thoughts"] for r in own], own, look, label, "-")
    axis.axhline(target_ms, color="black", ls="--", lw=1, label=f"target {target_ms:g} ms")
    finish(axis, xlabel="thoughts per position", ylabel="forward pass (ms), median to 95th percentile", ylim=(0, None))
    return figure


def model_latency(rows: list[dict], target_ms: float):
    """Draw rows of ``model_sizes.measure_models``: times by setting, and what those of the longest text consist of."""
    figure, (left, right) = new_figure(12, 4.2, 2, dpi=100)
    models, longest = list(dict.fromkeys(r["model"] for r in rows)), max(r["text_length"] for r in rows)
    setting = "{positions}x{num_thoughts}x{thought_length}".format_map
    for model, look in zip(models, LOOKS, strict=False):
        own = [r for r in rows if r["model"] == model]
        _median_to_p95(left, range(len(own)), own, look, f"{model} parameters")
    names = [f"L{r['text_length']} {setting(r)}" for r in rows if r["model"] == models[0]]
    left.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    left.axhline(target_ms, color="black", ls="--", lw=1, label=f"target {target_ms:g} ms")
    finish(left, yscale="log", ylabel="forward pass (ms)", xlabel="text length, positions x thoughts x tokens")
    shown = [r for r in rows if r["text_length"] == longest]
    places, below = range(len(shown)), np.zeros(len(shown))
    looks = ((GREY, "//"), (ORANGE, ".."), ("white", "xx"), (BLUE, ""))
    for part, (colour, hatch) in zip(shown[0]["shares"], looks, strict=True):
        share = np.array([r["shares"][part] for r in shown])
        right.barh(places, share, left=below, color=colour, hatch=hatch, edgecolor="black", lw=0.5, label=part)
        below += share
    right.set_yticks(places, [f"{r['model']} {setting(r)}" for r in shown], fontsize=8)
    right.invert_yaxis()
    above = {"ncol": 4, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    finish(right, legend=above, xlabel=f"share of the median, text of {longest} tokens", xlim=(0, 1))
    return figure


def ladder(steps: dict[str, tuple]):
    """Draw the accuracy (value, low, high) of each model, in blue with thoughts. Low and high may be None."""
    figure, axis = new_figure(7.5, 0.6 + 0.5 * len(steps), dpi=100)
    for i, (label, (value, low, high)) in enumerate(steps.items()):
        if value is None:
            axis.text(0.01, i, "not measured", va="center")
            continue
        look = LOOKS[0 if "with thoughts" in label else 1]
        axis.barh(i, value, 0.6, color=look.colour, hatch=look.hatch, edgecolor="white")
        if low is not None:
            axis.errorbar(value, i, xerr=_spread([(value, low, high)]), color="black", capsize=3)
        axis.text(0.01, i, f"{value:.3f}", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.set_yticks(range(len(steps)), list(steps))
    axis.set(xlabel="exact match on test problems (share)", xlim=(0, 1.0), ylim=(len(steps) - 0.5, -0.5))
    return figure


def calibration(scores: dict[str, Reliability]):
    """Draw the share of right thoughts per bin of each score against the score, with 95 % intervals.

    A larger mark stands for more thoughts. On the dotted line a score would be the probability of being right.
    """
    figure, axes = new_figure(4 * len(scores), 3.8, len(scores), dpi=100, sharey=True)
    for axis, (name, one) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        bins = pd.DataFrame(one.bins)
        x, y, share = bins["score"], bins["right"], bins["count"] / bins["count"].sum()
        axis.plot([0, 1], [0, 1], ":", color="black", lw=1)
        axis.errorbar(x, y, yerr=_spread(bins[["right", "low", "high"]]), fmt="none", ecolor=GREY, capsize=3)
        axis.scatter(x, y, s=15 + 150 * share, marker="o", color=BLUE)
        title = f"calibration error {one.error[0]:.2f}\nright before wrong {one.preference[0]:.2f}"
        axis.set(xlabel=f"{name} (0 to 1)", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axis.set_title(title, fontsize=10)
    np.atleast_1d(axes)[0].set_ylabel("thoughts that lead to the right answer (share)")
    return figure
