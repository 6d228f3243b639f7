"""Figures and tables of thoughts inside running text.

Rows are those of the pocket run's ``experiments/anywhere.csv``, or of SmolLM2's ``experiments/solutions.csv``.
"""

import numpy as np
import pandas as pd

from ..evaluation.where import SHARES
from ..stats import over_seeds, seed_interval, shown
from .figures import LOOKS, new_figure

GUESSES = {
    "expected": "the gain head",
    "entropy": "entropy of the plain prediction",
    "rule": "a fixed rule: after `has`",
}
LABELS = {
    "without": "the plain prediction",
    "temperature": "one fitted temperature",
    "foreign": "another text's thoughts",
    "filler": "filler of equal length",
}


def over_controls(rows: list[dict], arm: str = "ours") -> pd.DataFrame:
    """Return the gain in nats per token over each control, by kind of text, a mean with its interval over seeds.

    The last columns hold the tenth of tokens that the plain model finds hardest.
    """
    mine, table = [row for row in rows if row["arm"] == arm], {}
    for control, label in LABELS.items():
        table[label] = {}
        for part, suffix in (("", ""), (", hardest tenth", "_hardest")):
            for kind in ("stories", "answers", "solutions"):
                values = [row[f"{kind}_over_{control}{suffix}"] for row in mine]
                table[label][f"{kind}{part}"] = shown(seed_interval(values), signed=True)
    return pd.DataFrame(table).rename_axis("text")


def in_solutions(rows: list[dict]) -> pd.DataFrame:
    """Return the gain in nats per token inside GSM8K's solutions over each control, by kind of token, over seeds."""
    parts = {"all": "all tokens", "results": "results of calculations", "hardest": "hardest tenth"}
    table = {
        label: {name: over_seeds([r[f"{part}_over_{control}"] for r in rows], True) for part, name in parts.items()}
        for control, label in LABELS.items()
    }
    return pd.DataFrame(table).rename_axis("tokens")


def where_it_pays(rows: list[dict], arm: str = "ours"):
    """Draw the gain on stories by the share of tokens at which the model thinks, a line per way to choose them."""
    mine = [row for row in rows if row["arm"] == arm]
    figure, axis = new_figure(6.6, 3.8)
    for look, (guess, label) in zip(LOOKS, GUESSES.items(), strict=False):
        mean, low, high = np.array(
            [seed_interval(column) for column in zip(*(r[f"{guess}_shares"] for r in mine), strict=True)]
        ).T
        area = seed_interval([row[f"{guess}_area"] for row in mine])[0]
        axis.plot(
            SHARES, mean, look.dash, color=look.colour, marker=look.marker, ms=5, label=f"{label} (area {area:.2f})"
        )
        axis.fill_between(SHARES, low, high, color=look.colour, alpha=0.15, lw=0)
    whole = np.mean([row["expected_shares"][-1] for row in mine])
    axis.plot((0, 1), (0, whole), ":", color="0.5", label="places drawn at random")
    axis.set(xlabel="share of the tokens at which the model thinks", ylabel="gain (nats per token)")
    axis.legend(fontsize=8)
    return figure


def areas(rows: list[dict]) -> pd.DataFrame:
    """Return for each arm the area under the curve of each guess against "a thought gains here", over seeds."""
    table = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        table[arm] = {label: over_seeds([r[f"{guess}_area"] for r in mine]) for guess, label in GUESSES.items()}
    return pd.DataFrame(table).rename_axis("area under the curve")


def objectives(rows: list[dict]) -> pd.DataFrame:
    """Return for each arm what it ends at, and its gain on stories for a thousand steps and for an hour of training."""
    table = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        gains = np.array([row["stories_over_without"] for row in mine])
        hours = np.array([row["training_seconds"] for row in mine]) / 3600
        steps = np.array([row["settings"]["steps"] for row in mine])
        table[arm] = {
            "seeds": len(mine),
            "gain on stories (nats per token)": over_seeds(list(gains), True),
            "the same for 1,000 steps": over_seeds(list(1000 * gains / steps), True),
            "the same for an hour": over_seeds(list(gains / hours), True),
            "gain after questions (share)": over_seeds([row["gain"] for row in mine], True),
            "theater checks reached": " ".join(f"{row['checks_reached']:.0f}/{row['checks']:.0f}" for row in mine),
        }
    return pd.DataFrame(table)
