"""Figures and tables of thoughts inside running text, from rows of ``anywhere.csv`` and ``solutions.csv``."""

import numpy as np
import pandas as pd

from ..evaluation.where import SHARES
from ..stats import over_seeds, seed_interval
from .figures import LOOKS, draw_band, finish, new_figure

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


def over_controls(rows: list[dict]) -> pd.DataFrame:
    """Return our gain in nats per token over each control, by kind of text, also of the plain model's hardest tenth."""
    kinds, ends = ("stories", "answers", "solutions"), {"": "", ", hardest tenth": "_hardest"}
    keys = {f"{kind}{part}": f"{kind}_over_{{}}{end}" for part, end in ends.items() for kind in kinds}
    return _gains([row for row in rows if row["arm"] == "ours"], keys).rename_axis("text")


def in_solutions(rows: list[dict]) -> pd.DataFrame:
    """Return the gain in nats per token inside GSM8K's solutions over each control, by kind of token, over seeds."""
    parts = {"all tokens": "all", "results of calculations": "results", "hardest tenth": "hardest"}
    return _gains(rows, {label: f"{part}_over_{{}}" for label, part in parts.items()}).rename_axis("tokens")


def _gains(rows: list[dict], keys: dict[str, str]) -> pd.DataFrame:
    """Return a column a control, over seeds. ``keys``: label -> a row's key, with a gap for the control's name."""
    table = {}
    for control, label in LABELS.items():
        table[label] = {part: over_seeds([r[key.format(control)] for r in rows], True) for part, key in keys.items()}
    return pd.DataFrame(table)


def where_it_pays(rows: list[dict]):
    """Draw our gain on stories by the share of tokens at which the model thinks, a line per way to choose them."""
    mine = [row for row in rows if row["arm"] == "ours"]
    figure, axis = new_figure(6.6, 3.8)
    for look, (guess, label) in zip(LOOKS, GUESSES.items(), strict=False):
        gains = zip(*(row[f"{guess}_shares"] for row in mine), strict=True)
        area = seed_interval([row[f"{guess}_area"] for row in mine])[0]
        draw_band(axis, SHARES, map(seed_interval, gains), look, f"{label} (area {area:.2f})")
    whole = np.mean([row["expected_shares"][-1] for row in mine])
    axis.plot((0, 1), (0, whole), ":", color="0.5", label="places drawn at random")
    finish(axis, xlabel="share of the tokens at which the model thinks", ylabel="gain (nats per token)")
    return figure


def areas(rows: list[dict]) -> pd.DataFrame:
    """Return for each arm the area under the curve of each guess against "a thought gains here", over seeds."""
    table = {}
    for arm, mine in pd.DataFrame(rows).groupby("arm", sort=False):
        table[arm] = {label: over_seeds(list(mine[f"{guess}_area"])) for guess, label in GUESSES.items()}
    return pd.DataFrame(table).rename_axis("area under the curve")


def objectives(rows: list[dict]) -> pd.DataFrame:
    """Return for each arm what it ends at, and its gain on stories for a thousand steps and for an hour of training."""
    table = {}
    for arm, mine in pd.DataFrame(rows).groupby("arm", sort=False):
        gains, hours = mine["stories_over_without"], mine["training_seconds"] / 3600
        reached = zip(mine["checks_reached"], mine["checks"], strict=True)
        table[arm] = {
            "seeds": len(mine),
            "gain on stories (nats per token)": over_seeds(list(gains), True),
            "the same per 1,000 steps": over_seeds(list(1000 * gains / mine["settings"].str["steps"]), True),
            "the same per hour": over_seeds(list(gains / hours), True),
            "gain after questions (share)": over_seeds(list(mine["gain"]), True),
            "theater checks reached": " ".join(f"{some:.0f}/{every:.0f}" for some, every in reached),
        }
    return pd.DataFrame(table)
