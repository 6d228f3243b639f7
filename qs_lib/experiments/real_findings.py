"""What the arms of a pretrained model say: a table, and claims decided by intervals over seeds."""

import numpy as np
import pandas as pd

from ..stats import column, fixed, interval, over_seeds, seed_interval, shown
from .findings import pairs

# Arm, the one it is compared with, the gain that is asked for, and what the interval over seeds must lie above.
CLAIMS = (
    ("baked", "answers alone", 0.0, 0.0),
    ("baked", "filler", 0.0, 0.0),
    ("baked", "plain teacher", 0.0, 0.0),
    ("baked", "foreign teacher", 0.0, 0.0),
    ("reinforced", "answers alone", 0.30, 0.20),
    ("reinforced", "baked", 0.05, 0.0),
    ("reinforced", "expert iteration", 0.0, 0.0),
    ("reinforced", "pg off", 0.0, 0.0),
)
_MEASURES = {"accuracy": "accuracy", "greedy": "greedy thought", "pass@1": "pass@1", "pass@8": "pass@8"}
_MEASURES |= {"without": "no thought", "gsm8k": "GSM8K", "gsm8k_easy": "GSM8K, 1 or 2 steps"}


def compare_arms(rows: list[dict]) -> pd.DataFrame:
    """Return a line for each arm: its number of seeds, and each measure as a mean with an interval over seeds."""
    table = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [{**dict.fromkeys(_MEASURES), **row} for row in rows if row["arm"] == arm]
        table[arm] = {"seeds": len(own)} | {name: over_seeds(column(own, arm, key)) for key, name in _MEASURES.items()}
    return pd.DataFrame(table).T


def judge_claims(rows: list[dict]) -> list[str]:
    """Return a sentence for each of ``CLAIMS``: reached, not reached, or not measured.

    The gain is one of accuracy, with its interval over seeds, and an interval over problems (each a mean over seeds).
    """
    said = []
    for arm, control, gain, above in CLAIMS:
        both, asked = pairs(rows, arm, control), f"{arm} - {control}"
        if not both:
            said.append(f"{asked}: not measured")
            continue
        gains = [mine["accuracy"] - other["accuracy"] for mine, other in both]
        problems = shown(interval(np.mean([_right(mine) - _right(other) for mine, other in both], 0)), True)
        goal = f"at least {gain:+.2f}, interval above {above:+.2f}" if gain else "interval above 0"
        measured, verdict = f"{gains[0]:+.3f} on the one seed of both, over problems {problems}", "Open"
        if len(gains) > 1:
            mean, low, _ = seed_interval(gains)
            measured = f"{over_seeds(gains, True)} over seeds, {problems} over problems"
            verdict = "reached" if mean >= gain and low > above else "NOT REACHED"
        said.append(f"{asked}: {measured}. Asked: {goal}. {verdict}")
    return said


def over_problems(row: dict, control: dict) -> dict[str, str]:
    """Return what ``row`` gains over ``control``, with four thoughts and with a greedy one, for reading."""
    return {key: shown(interval(_right(row, key) - _right(control, key)), True) for key in ("right", "right_greedy")}


def _right(row: dict, key: str = "right") -> np.ndarray:
    """Return whether a row's answers are right (problems,), 0 or 1."""
    return np.array([int(x) for x in row[key][1:]])


def by_kind(rows: list[dict], problems: list[dict]) -> pd.DataFrame:
    """Return the accuracy of each arm, a mean over seeds, on kinds of test problems.

    ``problems``: each one's ``steps``, and whether a training question is ``near`` it, see ``real_model.describe``.
    """
    steps, near = (np.array([p[key] for p in problems]) for key in ("steps", "near"))
    kinds = {"1 step": steps == 1, "2 steps or more": steps > 1}
    kinds |= {"a training question is near": near == 1, "none is near": near == 0}
    table = {f"{name} ({kind.sum()})": {} for name, kind in kinds.items()}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        right = np.mean([_right(row) for row in rows if row["arm"] == arm], 0)
        for name, kind in zip(table, kinds.values(), strict=True):
            table[name][arm] = fixed(right[kind].mean())
    return pd.DataFrame(table)
