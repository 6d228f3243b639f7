"""What the reinforcement experiments say: each claim is reached or refuted by an interval over seeds, or open."""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..files import read_rows, to_json, write_bytes
from ..stats import column, fixed, over_seeds, seed_interval, shown
from ..viewing.html import BLUE, GREY
from ..workbook.figures import new_figure

SMALLEST = 0.01  # accuracy that a part of the objective must add to count as useful
DEPTHS = (("from un-baked", "none"), ("from eighth-baked", "an eighth"), ("from half-baked", "half"), ("full", "all"))


def pairs(rows: list[dict], arm: str, control: str) -> list[tuple[dict, dict]]:
    """Return rows of ``arm`` and ``control`` for each seed that both have, from the same baked model, by seed."""
    of = {name: {(r["seed"], r.get("data", "")): r for r in rows if r["arm"] == name} for name in (arm, control)}
    return [(of[arm][one], of[control][one]) for one in sorted(set(of[arm]) & set(of[control]))]


def paired(rows: list[dict], arm: str, control: str, key: str) -> list[float]:
    """Return ``arm`` minus ``control``, pair by pair."""
    return [mine[key] - other[key] for mine, other in pairs(rows, arm, control)]


def steps_to(row: dict, accuracy: float) -> float:
    """Return the RL steps until a row's validation accuracy first was at ``accuracy``, infinity if it never was."""
    every, steps = row["settings"]["evaluate_every"], row["settings"]["steps"]
    reached = (min((i + 1) * every, steps) for i, value in enumerate(row["validation"]) if value >= accuracy)
    return next(reached, math.inf)


def fewer_steps(rows: list[dict], arm: str, control: str, halve_errors: bool = False) -> tuple[list[float], int, float]:
    """Compare the steps that ``arm`` and ``control`` need to a validation accuracy.

    Returns (ratios, never, accuracy): steps of ``arm`` over steps of ``control`` minus 1, pair by pair, the number of
    pairs whose control never got there, and the mean of the accuracies. The accuracy is the one that every run of both
    reached. With ``halve_errors`` it is, for each pair, the one at which half of the errors are gone that ``arm``'s
    start model makes: champions differ in what they can reach. A run that never got there counts with all its steps.
    Where that is the control, its ratio is an upper bound.
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
    """Return ``reached`` where the interval over seeds lies wholly on the claimed side of ``claim``, ``refuted`` where
    wholly on the other, else ``open``. Raises ``ValueError`` below two seeds."""
    _, low, high = seed_interval(values)
    good, bad = (low >= claim, high < claim) if above else (high <= claim, low > claim)
    return "reached" if good else "refuted" if bad else "open"


class Question(NamedTuple):
    """What is asked of the rows: its number in every seed, and whether it is at least (or at most) what is claimed."""

    values: list[float]
    claim: float = 0.0
    above: bool = True


def questions(rl: list[dict], ahead: list[dict] = ()) -> dict[str, Question]:
    """Return every question of ``rl.csv`` and ``look_ahead.csv`` whose arms have two seeds or more in common."""

    def over(control, arm="full", key="accuracy"):
        return paired(rl, arm, control, key)

    digits = paired(ahead, "n_true 4", "n_true 1", "accuracy")
    greedy_off = Question(column(rl, "pg off", "greedy_gain"), above=False)
    asked = {
        "accuracy after RL minus baked": Question(column(rl, "full", "gain"), 0.05),
        "the same, one greedy thought": Question(column(rl, "full", "greedy_gain")),
        "pg off: gain, should not be above 0": Question(column(rl, "pg off", "gain"), above=False),
        "pg off: gain of one greedy thought, should not be above 0": greedy_off,
        "REINFORCE itself: full minus pg off": Question(over("pg off")),
        "thoughts: full minus training on answers alone": Question(over("without thoughts")),
        "beyond one fitted temperature (probability of the answer)": Question(column(rl, "full", "beyond_temperature")),
        "n_true 4 minus 1, one-token answers": Question(over("n_true 1"), SMALLEST),
        "n_true 4 minus 1, answers in digits": Question(digits),
        "the same, as much as is claimed": Question(digits, 0.044),
        "thinking use, token scale 100 minus 1": Question(over("full", "token scale 100", "thinking_use"), 0.47),
        "token scale 100 minus 1": Question(over("full", "token scale 100"), SMALLEST),
        "KL 0.1 minus 0": Question(over("KL 0"), SMALLEST),
        "curriculum minus none": Question(over("no curriculum"), SMALLEST),
        "4 thoughts minus 2 in training": Question(over("2 thoughts"), SMALLEST),
        "8 thoughts minus 4 in training": Question(over("full", "8 thoughts"), SMALLEST),
        "our objective minus the paper's": Question(over("paper objective"), SMALLEST),
        "baked minus half-baked start, final accuracy": Question(over("from half-baked"), SMALLEST),
    }
    if ahead:
        fewer = fewer_steps(ahead, "n_true 4", "n_true 1")[0]
        asked["steps, n_true 4 over 1, minus 1, digits"] = Question(fewer, -0.25, above=False)
    for arm, _ in DEPTHS[-2::-1]:
        ratios, never, _ = fewer_steps(rl, "full", arm, halve_errors=True)
        late = f" (it never arrives in {never} of {len(ratios)} seeds: at least)" if never else ""
        saved = [-ratio for ratio in ratios]
        asked[f"jumpstart: share of steps saved over RL {arm}{late}"] = Question(saved)
        asked[f"the same over RL {arm}, as much as is claimed"] = Question(saved, 0.3)
    return {name: one for name, one in asked.items() if len(one.values) >= 2}


def claims(rl: list[dict], ahead: list[dict] = ()) -> pd.DataFrame:
    """Return every one of :func:`questions` with its claim, what was measured and whether that decides it."""
    table = {}
    for name, (values, claim, above) in questions(rl, ahead).items():
        table[name] = {"measured": shown(seed_interval(values), signed=True), "seeds": len(values)}
        table[name] |= {"claim": f"{'>=' if above else '<='} {claim:g}", "decided": decided(values, claim, above)}
    return pd.DataFrame(table).T


def objective_parts(rl: list[dict]):
    """Draw what each part of the objective adds to accuracy: a dot per seed, the mean with its interval over seeds.

    The dashed line is what the interval must lie beyond for the part to count as useful.
    """
    asked = {name: one.values for name, one in questions(rl).items() if one.claim == SMALLEST}
    figure, axis = new_figure(7.4, 0.8 + 0.38 * len(asked))
    beside = {"xycoords": axis.get_yaxis_transform(), "va": "center", "fontsize": 9}
    for y, values in enumerate(asked.values()):
        mean, low, high = (100 * x for x in seed_interval(values))
        axis.plot([100 * x for x in values], [y] * len(values), "o", color=GREY, ms=4, alpha=0.6)
        axis.errorbar(mean, y + 0.22, xerr=[[mean - low], [high - mean]], fmt="D", color=BLUE, ms=5, capsize=3)
        axis.annotate(decided(values, SMALLEST), (1.01, y), **beside)
    axis.axvline(0, color="black", lw=0.8)
    axis.axvline(100 * SMALLEST, color="black", lw=0.8, ls="--")
    axis.set_yticks(range(len(asked)), list(asked))
    axis.set(ylim=(len(asked) - 0.4, -0.6), xlabel="points of accuracy (dashed: a useful part)")
    axis.grid(alpha=0.3, axis="x")
    return figure


def arms_table(rl: list[dict]) -> pd.DataFrame:
    """Return arm by arm, on test problems, the gain over its start model with the interval over seeds, mean accuracies
    with four thoughts, with one greedy thought and with none, and the share of replies that think."""
    table = {}
    kinds = {"accuracy": "accuracy", "greedy thought": "greedy", "no thought": "without", "thinks": "thinking_use"}
    for arm in dict.fromkeys(row["arm"] for row in rl):
        gains = column(rl, arm, "gain")
        table[arm] = {"seeds": len(gains), "gain": over_seeds(gains, True)}
        for name, key in kinds.items():
            values = [row[key] for row in rl if row["arm"] == arm and key in row]
            table[arm][name] = fixed(float(np.mean(values))) if values else ""
    return pd.DataFrame(table).T


def baking_depth(rl: list[dict]):
    """Draw accuracy with four thoughts before and after RL by how far the start model was baked, one mark per seed."""
    figure, axis = new_figure()
    for at, (arm, _) in enumerate(DEPTHS):
        own = sorted((r for r in rl if r["arm"] == arm), key=lambda row: row["seed"])
        for i, row in enumerate(own):
            x, before, after = at + 0.04 * (i - (len(own) - 1) / 2), row["baseline"], row["accuracy"]
            labels = ("", "") if axis.lines else ("before RL", "after RL")
            axis.annotate("", (x, after), (x, before), arrowprops={"arrowstyle": "->", "color": GREY})
            axis.plot(x, before, "s", color=GREY, ms=5, label=labels[0])
            axis.plot(x, after, "o", color=BLUE, ms=6, label=labels[1])
    axis.set_xticks(range(len(DEPTHS)), [label for _, label in DEPTHS])
    axis.set(xlabel="baking before RL", ylabel="accuracy with thoughts (share)", ylim=(0, 1.02))
    axis.grid(alpha=0.3, axis="y")
    if axis.lines:
        axis.legend(fontsize=8)
    return figure


def depth_lines(rl: list[dict]) -> list[str]:
    """Return the figure of :func:`baking_depth` in numbers, a line per start model."""
    lines = []
    for arm, label in DEPTHS:
        if own := column(rl, arm, "baseline"):
            before, after = float(np.mean(own)), float(np.mean(column(rl, arm, "accuracy")))
            lines.append(f"{label}: {fixed(before)} -> {fixed(after)}, seeds: {len(own)}")
    return lines


def write_criterion(folder: Path, name: str, values, command: str, note: str = "") -> None:
    """Write ``name.json`` for the scoreboard: a mean over seeds with its interval, if there are two or more."""
    if len(values) >= 2:
        value, low, high = seed_interval(values)
        record = {"value": value, "low": low, "high": high, "seeds": len(values), "command": command + note}
        write_bytes(folder / f"{name}.json", f"{to_json(record, indent=1)}\n".encode())


def for_scoreboard(folder: Path) -> None:
    """Write ``<id>.json`` (value, low, high, command) for the scoreboard's criteria that these experiments measure."""
    rl, ahead = read_rows(folder / "rl.csv"), read_rows(folder / "look_ahead.csv")
    write = partial(write_criterion, folder)
    if ahead:
        command = "make evidence X=look_ahead"
        ratios, _, level = fewer_steps(ahead, "n_true 4", "n_true 1")
        write("nonmyopic_steps", ratios, command, f" (answers in digits, to validation accuracy {level:.3f})")
        write("nonmyopic_accuracy", paired(ahead, "n_true 4", "n_true 1", "accuracy"), command, " (answers in digits)")
    command, use = "make evidence X=rl", float(np.mean(column(rl, "full", "thinking_use") or [0]))
    write("token_scale_use", column(rl, "token scale 100", "thinking_use"), command, f" (at scale 1: {fixed(use)})")
    ratios, never, level = fewer_steps(rl, "full", "from un-baked", halve_errors=True)
    bound = f"; a lower bound: the un-baked model does not get there in {never} of {len(ratios)} seeds" if never else ""
    until = f"until half of the baked model's errors are gone, validation accuracy {level:.3f}{bound}"
    write("jumpstart", [-ratio for ratio in ratios], command, f" ({until})")
