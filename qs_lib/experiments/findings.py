"""What the reinforcement experiments say: each claim reached or refuted by an interval over seeds, or said to be open."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from ..files import read_rows, write_bytes
from ..stats import column, fixed, seed_interval, shown
from ..workbook.figures import BLUE, GREY, new_figure

SMALLEST = 0.01  # accuracy that a part of the objective must add to count as useful
DEPTHS = (("from un-baked", "none"), ("from eighth-baked", "an eighth"), ("from half-baked", "half"), ("full", "all"))


def pairs(rows: list[dict], arm: str, control: str) -> list[tuple[dict, dict]]:
    """Rows of ``arm`` and ``control`` of every seed that both have, from the same baked model, in order of seeds."""
    of = {name: {(r["seed"], r.get("data", "")): r for r in rows if r["arm"] == name} for name in (arm, control)}
    return [(of[arm][one], of[control][one]) for one in sorted(set(of[arm]) & set(of[control]))]


def paired(rows: list[dict], arm: str, control: str, key: str) -> list[float]:
    """``arm`` minus ``control``, pair by pair."""
    return [mine[key] - other[key] for mine, other in pairs(rows, arm, control)]


def steps_to(row: dict, accuracy: float) -> float:
    """RL steps until the validation accuracy of a row first was at ``accuracy``; infinite where it never was."""
    every, steps = row["settings"]["evaluate_every"], row["settings"]["steps"]
    reached = (min((i + 1) * every, steps) for i, value in enumerate(row["validation"]) if value >= accuracy)
    return next(reached, math.inf)


def fewer_steps(rows: list[dict], arm: str, control: str, halve_errors: bool = False) -> tuple[list[float], int, float]:
    """Steps of ``arm`` over steps of ``control``, minus 1, pair by pair, to a validation accuracy: (ratios, pairs whose control
    never got there, mean of the accuracies).

    The accuracy is the one that every run of both reached, or, with ``halve_errors``, for each pair the one at which half of the
    errors are gone that the model makes from which ``arm`` starts: champions differ in what they can reach. A run that never
    got there counts with all its steps: where that is the control, its ratio is an upper bound.
    """
    both = pairs(rows, arm, control)
    common = min((max(row["validation"]) for pair in both for row in pair), default=math.nan)
    levels = [(1 + mine["baseline"]) / 2 if halve_errors else common for mine, _ in both]
    ratios, never = [], 0
    for (mine, other), level in zip(both, levels, strict=True):
        steps, control_steps = (min(steps_to(row, level), row["settings"]["steps"]) for row in (mine, other))
        ratios.append(steps / control_steps - 1)
        never += max(other["validation"]) < level
    return ratios, never, float(np.mean(levels)) if levels else math.nan


def decided(values: list[float], claim: float, above: bool = True) -> str:
    """``reached`` where the interval over seeds lies wholly on the claimed side of ``claim``, ``refuted`` where wholly on the
    other, else ``open``. Raises ``ValueError`` below two seeds."""
    _, low, high = seed_interval(values)
    good, bad = (low >= claim, high < claim) if above else (high <= claim, low > claim)
    return "reached" if good else "refuted" if bad else "open"


def questions(rl: list[dict], ahead: list[dict] = ()) -> dict[str, tuple[list[float], float, bool]]:
    """Every question as (its number in every seed, what is claimed, whether at least that much or at most); questions whose
    arms have fewer than two seeds in common are left out. ``rl``, ``ahead``: rows of ``rl.csv`` and ``look_ahead.csv``."""

    def over(control, key="accuracy"):
        return paired(rl, "full", control, key)

    asked = {
        "accuracy after RL minus baked": (column(rl, "full", "gain"), 0.05, True),
        "the same, one greedy thought": (column(rl, "full", "greedy_gain"), 0.0, True),
        "pg off: gain, should not be above 0": (column(rl, "pg off", "gain"), 0.0, False),
        "pg off: gain of one greedy thought, should not be above 0": (column(rl, "pg off", "greedy_gain"), 0.0, False),
        "REINFORCE itself: full minus pg off": (over("pg off"), 0.0, True),
        "thoughts: full minus training on answers alone": (over("without thoughts"), 0.0, True),
        "beyond one fitted temperature (probability of the answer)": (
            column(rl, "full", "beyond_temperature"),
            0.0,
            True,
        ),
        "n_true 4 minus 1, one-token answers": (over("n_true 1"), SMALLEST, True),
        "n_true 4 minus 1, answers in digits": (paired(ahead, "n_true 4", "n_true 1", "accuracy"), 0.0, True),
        "the same, as much as is claimed": (paired(ahead, "n_true 4", "n_true 1", "accuracy"), 0.044, True),
        "thinking use, token scale 100 minus 1": (paired(rl, "token scale 100", "full", "thinking_use"), 0.47, True),
        "token scale 100 minus 1": (paired(rl, "token scale 100", "full", "accuracy"), SMALLEST, True),
        "KL 0.1 minus 0": (over("KL 0"), SMALLEST, True),
        "curriculum minus none": (over("no curriculum"), SMALLEST, True),
        "4 thoughts minus 2 in training": (over("2 thoughts"), SMALLEST, True),
        "8 thoughts minus 4 in training": (paired(rl, "8 thoughts", "full", "accuracy"), SMALLEST, True),
        "our objective minus the paper's": (over("paper objective"), SMALLEST, True),
        "baked minus half-baked start, final accuracy": (over("from half-baked"), SMALLEST, True),
    }
    if ahead:
        asked["steps, n_true 4 over 1, minus 1, digits"] = (fewer_steps(ahead, "n_true 4", "n_true 1")[0], -0.25, False)
    for arm, _ in DEPTHS[-2::-1]:
        ratios, never, _ = fewer_steps(rl, "full", arm, halve_errors=True)
        late = f" (it never arrives in {never} of {len(ratios)} seeds: at least)" if never else ""
        saved = [-ratio for ratio in ratios]
        asked[f"jumpstart: share of steps saved over RL {arm}{late}"] = (saved, 0.0, True)
        asked[f"the same over RL {arm}, as much as is claimed"] = (saved, 0.3, True)
    return {name: one for name, one in asked.items() if len(one[0]) >= 2}


def claims(rl: list[dict], ahead: list[dict] = ()) -> pd.DataFrame:
    """Every one of :func:`questions` with its claim, what was measured over seeds and whether that decides it."""
    return pd.DataFrame(
        {
            name: {
                "measured": shown(seed_interval(values), signed=True),
                "seeds": len(values),
                "claim": f"{'>=' if above else '<='} {claim:g}",
                "decided": decided(values, claim, above),
            }
            for name, (values, claim, above) in questions(rl, ahead).items()
        }
    ).T


def parts(rl: list[dict]):
    """What each part of the objective adds to accuracy: a dot per seed, the mean with its interval over seeds, and the line
    that the interval must lie beyond for the part to count as useful."""
    asked = {name: values for name, (values, claim, _) in questions(rl).items() if claim == SMALLEST}
    figure, axis = new_figure(7.4, 0.8 + 0.38 * len(asked))
    for y, values in enumerate(asked.values()):
        mean, low, high = (100 * x for x in seed_interval(values))
        axis.plot([100 * x for x in values], [y] * len(values), "o", color=GREY, ms=4, alpha=0.6)
        axis.errorbar(mean, y + 0.22, xerr=[[mean - low], [high - mean]], fmt="D", color=BLUE, ms=5, capsize=3)
        axis.annotate(
            decided(values, SMALLEST), (1.01, y), xycoords=axis.get_yaxis_transform(), va="center", fontsize=9
        )
    axis.axvline(0, color="black", lw=0.8)
    axis.axvline(100 * SMALLEST, color="black", lw=0.8, ls="--")
    axis.set(
        yticks=range(len(asked)),
        yticklabels=list(asked),
        ylim=(len(asked) - 0.4, -0.6),
        xlabel="points of accuracy (dashed: a useful part)",
    )
    axis.grid(alpha=0.3, axis="x")
    return figure


def arms_table(rl: list[dict]) -> pd.DataFrame:
    """Arm by arm on test problems: gain over the model it started from with its interval over seeds, and mean accuracies with
    four thoughts, one greedy thought and none, and replies that think."""
    table = {}
    for arm in dict.fromkeys(row["arm"] for row in rl):
        gains = column(rl, arm, "gain")
        gain = shown(seed_interval(gains), signed=True) if len(gains) > 1 else fixed(gains[0], 3, True)
        own = [row for row in rl if row["arm"] == arm]
        table[arm] = {
            "seeds": len(own),
            "gain": gain,
            **{
                name: fixed(float(np.mean([r[key] for r in own if key in r])), 3) if any(key in r for r in own) else ""
                for name, key in (
                    ("accuracy", "accuracy"),
                    ("greedy thought", "greedy"),
                    ("no thought", "without"),
                    ("thinks", "thinking_use"),
                )
            },
        }
    return pd.DataFrame(table).T


def baking_depth(rl: list[dict]):
    """Accuracy with four thoughts before and after RL by how far the start model was baked; one mark per seed."""
    figure, axis = new_figure()
    first = True
    for at, (arm, _) in enumerate(DEPTHS):
        own = sorted((r for r in rl if r["arm"] == arm), key=lambda row: row["seed"])
        for i, row in enumerate(own):
            x = at + 0.04 * (i - (len(own) - 1) / 2)
            axis.annotate(
                "", (x, row["accuracy"]), (x, row["baseline"]), arrowprops={"arrowstyle": "->", "color": GREY}
            )
            axis.plot(x, row["baseline"], "s", color=GREY, ms=5, label="before RL" if first else None)
            axis.plot(x, row["accuracy"], "o", color=BLUE, ms=6, label="after RL" if first else None)
            first = False
    axis.set(
        xticks=range(len(DEPTHS)),
        xticklabels=[label for _, label in DEPTHS],
        xlabel="baking before RL",
        ylabel="accuracy with thoughts (share)",
        ylim=(0, 1.02),
    )
    axis.grid(alpha=0.3, axis="y")
    if not first:
        axis.legend(fontsize=8)
    return figure


def depth_lines(rl: list[dict]) -> list[str]:
    """The figure of :func:`baking_depth` in numbers, a line per start."""
    lines = []
    for arm, label in DEPTHS:
        own = [row for row in rl if row["arm"] == arm]
        if own:
            before, after = (float(np.mean([r[key] for r in own])) for key in ("baseline", "accuracy"))
            lines.append(f"{label}: {fixed(before)} -> {fixed(after)}, seeds: {len(own)}")
    return lines


def for_scoreboard(folder: Path) -> None:
    """Write ``<id>.json`` (value, low, high, command) for the criteria of the scoreboard that these experiments measure."""
    rl, ahead = read_rows(folder / "rl.csv"), read_rows(folder / "look_ahead.csv")

    def write(name, values, command, note=""):
        if len(values) >= 2:
            value, low, high = seed_interval(values)
            record = {"value": value, "low": low, "high": high, "seeds": len(values), "command": command + note}
            write_bytes(folder / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())

    if ahead:
        command = "make evidence X=look_ahead"
        ratios, _, level = fewer_steps(ahead, "n_true 4", "n_true 1")
        write("nonmyopic_steps", ratios, command, f" (answers in digits, to validation accuracy {level:.3f})")
        write("nonmyopic_accuracy", paired(ahead, "n_true 4", "n_true 1", "accuracy"), command, " (answers in digits)")
    write(
        "token_scale_use",
        column(rl, "token scale 100", "thinking_use"),
        "make evidence X=rl",
        f" (at scale 1: {fixed(float(np.mean(column(rl, 'full', 'thinking_use') or [0])))})",
    )
    ratios, never, level = fewer_steps(rl, "full", "from un-baked", halve_errors=True)
    bound = f"; a lower bound: the un-baked model does not get there in {never} of {len(ratios)} seeds" if never else ""
    write(
        "jumpstart",
        [-ratio for ratio in ratios],
        "make evidence X=rl",
        f" (until half of the baked model's errors are gone, validation accuracy {level:.3f}{bound})",
    )
