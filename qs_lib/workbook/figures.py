"""The figures of all notebooks. Each function returns a matplotlib Figure; marks differ by shape, not only by colour."""

import os
import time

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.ticker import MaxNLocator

from ..stats import Reliability, interval, pearson
from ..viewing.escape import safe_label

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
STYLES = ((BLUE, "-", "o", ""), (GREY, "--", "s", "//"))  # this run; the committed pocket run
PANELS = (
    ("reward", "reward (nats)"),
    ("validation_accuracy", "validation accuracy (share)"),
    ("no_thought_weight", "weight of no thought (share)"),
    ("kl", "KL to the baked model (nats)"),
    ("length", "length (tokens)"),
    ("entropy", "entropy (nats per token)"),
    ("diversity", "different answers per problem"),
    ("max_logit", "largest attention logit"),
)


def new_figure(width: float = 6.4, height: float = 3.4, columns: int = 1):
    """(figure, axes) in inches, of one row."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=90, layout="constrained")
    plt.close(figure)  # shown once, as the value of its cell
    return figure, axes


def idea():
    """Quiet-STaR in one picture: thoughts branch off after a token, and their predictions are mixed with the plain one."""
    figure, axes = new_figure(9.0, 3.2)
    axes.set(xlim=(0, 12), ylim=(0.2, 4.6))
    axes.axis("off")

    def box(x, y, text, colour, style="round"):
        axes.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            family="monospace",
            fontsize=9,
            bbox={"boxstyle": f"{style},pad=0.3", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5},
        )

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
    notes = (
        (1.7, 0.9, "text so far"),
        (6.3, 4.35, "K thoughts, sampled in parallel"),
        (6.3, 0.5, "what it would have said"),
        (10.6, 0.5, "p = w₀ p₀ + Σ wₖ pₖ"),
    )
    for x, y, text in notes:
        axes.text(x, y, text, ha="center", fontsize=9, style="italic")
    return figure


def curves(runs: dict[str, list[dict]], x: str, panels: dict[str, str], xlabel: str):
    """One panel per key of ``panels`` (key -> axis label with unit) against ``x``; one line per run that has rows."""
    figure, axes = new_figure(max(5.6, 3.6 * len(panels)), 3.2, len(panels))
    for axis, (key, label) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for (name, rows), (colour, line, marker, _) in zip(runs.items(), STYLES, strict=False):
            points = [(r[x], r[key]) for r in rows if key in r and x in r]
            if points:
                every = max(1, len(points) // 12)
                axis.plot(
                    *zip(*points, strict=True), line, color=colour, marker=marker, markevery=every, ms=5, label=name
                )
        axis.set(xlabel=xlabel, ylabel=label)
        axis.grid(alpha=0.3)
    if any(runs.values()):
        np.atleast_1d(axes)[0].legend(fontsize=8)
    return figure


def lines(series: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, log: bool = False):
    """One line of (x, y) points per name, told apart by mark and dash; ``log``: logarithmic x axis."""
    figure, axis = new_figure(6.8, 3.4)
    looks = ((GREY, "--", "s"), ("black", ":", "D"), (BLUE, "-.", "^"), (ORANGE, "-", "o"))
    for (name, points), (colour, dash, marker) in zip(series.items(), looks[-len(series) :], strict=True):
        every = max(1, len(points) // 12)
        axis.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, markevery=every, ms=5, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def sweep(rows: list[dict], x: str, ys: list[str], lines: list[str]):
    """One panel per number of ``ys`` against the parameter ``x``: a line, the mean of its rows, for each combination of the
    parameters ``lines``, and a small mark for each row."""
    figure, axes = new_figure(max(5.6, 4.2 * len(ys)), 3.4, len(ys))
    groups = {}
    for row in rows:
        groups.setdefault(", ".join(f"{name} {row[name]}" for name in lines), []).append(row)
    colours, marks = (BLUE, ORANGE, GREY, "black"), (("-", "o"), ("--", "s"), (":", "D"), ("-.", "^"))
    looks = [(colours[i % 4], *marks[(i + i // 4) % 4]) for i in range(16)]  # neighbours differ in all three
    for axis, y in zip(np.atleast_1d(axes), ys, strict=True):
        for i, (name, group) in enumerate(groups.items()):
            colour, dash, marker = looks[i % len(looks)]
            points = [(r[x], r[y]) for r in group if isinstance(r.get(y), (int, float))]
            places = list(dict.fromkeys(place for place, _ in points))
            means = [np.mean([value for place, value in points if place == here]) for here in places]
            axis.plot(places, means, dash, color=colour, marker=marker, ms=5, label=safe_label(name) or "mean")
            axis.plot(
                [place for place, _ in points], [value for _, value in points], ".", color=colour, ms=3, alpha=0.6
            )
        axis.set(xlabel=safe_label(x), ylabel=safe_label(y))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def row_norms(real: list[float], new: dict[str, float]):
    """Histogram of the norms of the rows a model has, with each new row marked and named."""
    figure, axis = new_figure(6.8, 3.2)
    counts, _, _ = axis.hist(real, bins=30, color=GREY, alpha=0.7, label=f"{len(real)} rows it had")
    axis.set_ylim(0, counts.max() * 2.2)
    for i, (token, norm) in enumerate(new.items()):
        height = counts.max() * (2.08 - 0.13 * i)
        axis.plot([norm], [height], "v", color=ORANGE, label="8 new rows" if i == 0 else None)
        axis.annotate(token, (norm, height), xytext=(7, -3), textcoords="offset points", fontsize=8, family="monospace")
    axis.set(xlabel="length of the embedding row (Euclidean norm)", ylabel="rows (count)")
    axis.legend(fontsize=8, loc="center right")
    return figure


def difficulty_shares(splits: dict[str, list[int]]):
    """Share of each split's problems by number of worked steps (``splits``: name -> difficulties)."""
    figure, axis = new_figure()
    levels = sorted({min(d, 9) for ds in splits.values() for d in ds})
    width = 0.8 / len(splits)
    for i, (name, difficulties) in enumerate(splits.items()):
        values = [np.mean([min(d, 9) == level for d in difficulties]) for level in levels]
        axis.bar(
            np.arange(len(levels)) + (i - (len(splits) - 1) / 2) * width,
            values,
            width * 0.92,
            label=name,
            color=(BLUE, GREY, ORANGE)[i % 3],
            hatch=("", "//", "..")[i % 3],
            edgecolor="white",
        )
    axis.set_xticks(range(len(levels)), [f"{d} or more" if d == 9 else str(d) for d in levels])
    axis.set(
        xlabel="difficulty (worked steps)", ylabel="share of the split's problems", ylim=(0, 1.25 * axis.get_ylim()[1])
    )
    axis.legend(fontsize=8, ncol=3, loc="upper right")
    return figure


def arms(runs: dict[str, dict[str, list[float]]]):
    """Accuracy of each arm as (mean, low, high), one group of bars per arm, one bar per run; whiskers: 95 % intervals."""
    figure, axis = new_figure(7.2, 3.6)
    runs = {name: values for name, values in runs.items() if values}
    names = list(next(iter(runs.values())))
    width = 0.8 / len(runs)
    for i, (run, values) in enumerate(runs.items()):
        mean, low, high = np.array([values[n] for n in names]).T
        at = np.arange(len(names)) + (i - (len(runs) - 1) / 2) * width
        axis.bar(
            at,
            mean,
            width * 0.92,
            yerr=[mean - low, high - mean],
            capsize=3,
            label=run,
            color=STYLES[i][0],
            hatch=STYLES[i][3],
            edgecolor="white",
            error_kw={"ecolor": "black", "lw": 1},
        )
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="test accuracy (share of problems)", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    return figure


def heat_map(
    table: dict[str, dict[str, float]],
    title: str,
    xlabel: str = "strategy of the reply",
    ylabel: str = "family of the problem",
):
    """A table of shares (row -> column -> share) with every number written in its cell."""
    rows, columns = list(table), list(next(iter(table.values())))
    values = np.array([[table[r][c] for c in columns] for r in rows])
    figure, axis = new_figure(0.8 * len(columns) + 2.2, 0.38 * len(rows) + 1.5)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black")
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def visible_keys(seen, queries: list[str], keys: list[str]):
    """The diagonal mask: a filled square with a dot where the query's prediction depends on the key."""
    seen = np.asarray(seen, float)
    figure, axis = new_figure(0.3 * len(keys) + 1.6, 0.3 * len(queries) + 1.2)
    axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.6)
    for i, j in np.argwhere(seen > 0):
        axis.plot(j, i, "o", ms=3, color="black")
    axis.set_xticks(range(len(keys)), [safe_label(x) for x in keys], rotation=90, fontsize=7, family="monospace")
    axis.set_yticks(range(len(queries)), [safe_label(x) for x in queries], fontsize=7, family="monospace")
    axis.set(xlabel="key (token that is read): text, or position.thought.token", ylabel="query (token that reads)")
    return figure


def bench(lines: list[dict]):
    """Ratios "another way / ours" of a bench file as bars on a log axis, each with its bound as a vertical stroke."""
    claims = ("one by one / ours", "generate / ours", "copied prefix / ours", "dense mask / ours")
    rows = [
        (claim, line)
        for claim in claims
        for line in lines
        if line["claim"] == claim and line["value"] and line["kind"] != "aim"
    ]
    figure, axis = new_figure(7.6, 0.34 * len(rows) + 1.2)
    looks = dict(zip(claims, ((GREY, "//"), (BLUE, ""), (ORANGE, ".."), ("white", "xx")), strict=True))
    for i, (claim, line) in enumerate(rows):
        axis.barh(i, line["value"], 0.7, color=looks[claim][0], hatch=looks[claim][1], edgecolor="black", lw=0.5)
        axis.text(1.08 * max(line["value"], line["bound"] or 0), i, f"{line['value']:.3g}", va="center", fontsize=8)
        if line["bound"]:
            axis.plot([line["bound"]] * 2, [i - 0.42, i + 0.42], color="black", lw=2.5)
    axis.set_yticks(range(len(rows)), [f"{claim.split(' / ')[0]}, {line['shape']}" for claim, line in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(
        xscale="log", xlabel="CPU time / ours (stroke: bound)", xlim=(0.7, 2 * max(line["value"] for _, line in rows))
    )
    return figure


def hard_positions(tokens: list[str], entropy: list[float], chosen: list[int]):
    """Entropy of the next-token prediction after each token of a text; the chosen positions are hatched and marked."""
    figure, axis = new_figure(max(7.0, 0.24 * len(tokens)), 3.2)
    picked = np.isin(np.arange(len(tokens)), chosen)
    bars = axis.bar(range(len(tokens)), entropy, color=np.where(picked, ORANGE, GREY), edgecolor="white")
    for at in np.flatnonzero(picked):
        bars[at].set_hatch("//")
        axis.plot(at, entropy[at], "v", color="black", ms=5)
    axis.set_xticks(range(len(tokens)), [safe_label(x) for x in tokens], rotation=90, fontsize=7)
    axis.set(xlabel="token after which the model predicts (marked: think here)", ylabel="entropy (nats)")
    return figure


def look_ahead(gains: list[list[float]], words: list[str]):
    """Gain in log-likelihood of each of the next true tokens; one dot per thought, a bar for their mean."""
    gains = np.asarray(gains, float)
    figure, axis = new_figure(5.6, 3.2)
    axis.bar(range(gains.shape[1]), gains.mean(0), color=GREY, alpha=0.5, hatch="//", edgecolor="white", label="mean")
    for k, row in enumerate(gains):
        axis.plot(
            np.arange(len(row)) + 0.05 * (k - len(gains) / 2),
            row,
            "o",
            ms=5,
            color=BLUE,
            label="one thought" if k == 0 else None,
        )
    axis.axhline(0, color="black", lw=0.8, ls=":")
    axis.set_xticks(range(len(words)), [safe_label(x) for x in words], family="monospace")
    axis.margins(y=0.1)
    axis.set(xlabel="true tokens after the thought, in order", ylabel="gain in log-likelihood (nats)")
    axis.legend(fontsize=8)
    return figure


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
                axis.plot(
                    steps,
                    smooth(values, 10) if dense else values,
                    style,
                    color=colour,
                    ms=4,
                    marker="o" if style == "-" else "s",
                    markevery=max(1, len(values) // 12),
                    label=name + (" (mean of 10)" if dense else ""),
                )
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
    axis.bar(
        positions,
        [m for m, _, _ in intervals],
        width,
        yerr=_spread(intervals),
        capsize=3,
        label=label,
        color=colour,
        hatch=hatch,
        edgecolor="white",
        error_kw={"ecolor": "black", "lw": 1},
    )


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
    for shift, values, label, colour, hatch in (
        (-0.2, before, "baked", GREY, "//"),
        (0.2, after, "after RL", BLUE, ""),
    ):
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
        kept = sorted(
            (r for r in rows if (r["positions"], r["thought_length"]) == (positions, length)),
            key=lambda r: r["num_thoughts"],
        )
        n, median = [r["num_thoughts"] for r in kept], np.array([r["median_ms"] for r in kept])
        p95 = np.array([r["p95_ms"] for r in kept])
        axis.errorbar(
            n,
            median,
            yerr=[0 * median, np.maximum(p95 - median, 0)],
            marker=marker,
            capsize=3,
            color=colour,
            label=f"{positions} position{'s' * (positions > 1)}, up to {length} tokens",
        )
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
        left.errorbar(
            range(len(own)),
            median,
            yerr=[0 * median, np.maximum(p95 - median, 0)],
            fmt=marker,
            ms=6,
            capsize=3,
            color=colour,
            label=f"{model} parameters",
        )
    own = [r for r in rows if r["model"] == models[0]]
    names = [f"L{r['text_length']} {r['positions']}x{r['num_thoughts']}x{r['thought_length']}" for r in own]
    left.set_xticks(range(len(own)), names, rotation=40, ha="right", fontsize=8)
    left.axhline(target_ms, color="black", ls="--", lw=1, label=f"target {target_ms:g} ms")
    left.set(yscale="log", ylabel="forward pass (ms)", xlabel="text length, positions x thoughts x tokens")
    left.legend(fontsize=8)
    shown = [r for r in rows if r["text_length"] == max(r["text_length"] for r in rows)]
    below = np.zeros(len(shown))
    for part, colour, hatch in zip(
        shown[0]["shares"], (GREY, ORANGE, "white", BLUE), ("//", "..", "xx", ""), strict=True
    ):
        share = np.array([r["shares"][part] for r in shown])
        right.barh(
            range(len(shown)), share, left=below, color=colour, hatch=hatch, edgecolor="black", lw=0.5, label=part
        )
        below += share
    right.set_yticks(
        range(len(shown)),
        [f"{r['model']} {r['positions']}x{r['num_thoughts']}x{r['thought_length']}" for r in shown],
        fontsize=8,
    )
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
        axis.barh(
            i, value, 0.6, color=BLUE if "RL" in label else GREY, hatch="" if "RL" in label else "//", edgecolor="white"
        )
        if low is not None:
            axis.errorbar(value, i, xerr=_spread([(value, low, high)]), color="black", capsize=3)
        axis.text(0.01, i, f"{value:.3f}", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.set_yticks(range(len(steps)), list(steps))
    axis.invert_yaxis()
    axis.set(xlabel="exact match on test problems (share)", xlim=(0, 1.0))
    return _finished(figure)


def reliability(scores: dict[str, Reliability]):
    """Share of right thoughts per bin of each score (mark, 95 % interval; a larger mark for more thoughts) against the
    score; on the dotted line a score would be the probability of being right."""
    figure, axes = plt.subplots(1, len(scores), figsize=(4 * len(scores), 3.8), layout="constrained", sharey=True)
    for axis, (name, one) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        x, y, low, high, count = np.array(
            [[b[k] for k in ("score", "right", "low", "high", "count")] for b in one.bins]
        ).T
        axis.plot([0, 1], [0, 1], ":", color="black", lw=1)
        axis.errorbar(x, y, yerr=np.maximum([y - low, high - y], 0), fmt="none", ecolor=GREY, capsize=3)
        axis.scatter(x, y, s=15 + 150 * count / count.sum(), marker="o", color=BLUE)
        axis.set(
            xlabel=f"{name} (0 to 1)",
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
            title=f"calibration error {one.error[0]:.2f}\nright before wrong {one.preference[0]:.2f}",
        )
        axis.title.set_fontsize(10)
    np.atleast_1d(axes)[0].set_ylabel("thoughts that lead to the right answer (share)")
    plt.close(figure)  # shown once, as the value of its cell
    return figure
