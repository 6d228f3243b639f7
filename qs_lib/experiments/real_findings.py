"""What the arms of a pretrained model say: a table, and claims decided by intervals over seeds."""

import numpy as np
import pandas as pd

from ..stats import column, fixed, interval, seed_interval, shown
from .findings import paired

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


def over_seeds(values: list[float], signed: bool = False) -> str:
    """Return a mean with its interval over seeds, or the one number there is, for reading."""
    values = [v for v in values if v is not None]
    if len(values) > 1:
        return shown(seed_interval(values), signed)
    return fixed(values[0], 3, signed) if values else ""


def compare_arms(rows: list[dict]) -> pd.DataFrame:
    """Return a line for each arm: its number of seeds, and each measure as a mean with an interval over seeds."""
    arms = {row["arm"]: None for row in rows}
    table = {}
    for arm in arms:
        own = [{**dict.fromkeys(_MEASURES), **row} for row in rows if row["arm"] == arm]
        table[arm] = {"seeds": len(own)} | {name: over_seeds(column(own, arm, key)) for key, name in _MEASURES.items()}
    return pd.DataFrame(table).T


def judge_claims(rows: list[dict]) -> list[str]:
    """Return a sentence for each of ``CLAIMS``: reached, not reached, or not measured.

    The gain is one of accuracy, with its interval over seeds, and an interval over problems (each a mean over seeds).
    """
    said = []
    for arm, control, gain, above in CLAIMS:
        found, asked = paired(rows, arm, control, "accuracy"), f"{arm} - {control}"
        if not found:
            said.append(f"{asked}: not measured")
            continue
        problems = shown(interval(np.mean(_outcomes(rows, arm) - _outcomes(rows, control), 0)), True)
        goal = f"at least {gain:+.2f}, interval above {above:+.2f}" if gain else "interval above 0"
        if len(found) == 1:
            said.append(
                f"{asked}: {found[0]:+.3f} on the one seed of both, over problems {problems}. Asked: {goal}. Open"
            )
            continue
        mean, low, _ = seed_interval(found)
        verdict = "reached" if mean >= gain and low > above else "NOT REACHED"
        said.append(
            f"{asked}: {over_seeds(found, True)} over seeds, {problems} over problems. Asked: {goal}. {verdict}"
        )
    return said


def _outcomes(rows: list[dict], arm: str) -> np.ndarray:
    """Return right answers (1, problems) of an arm, 0 or 1, a mean over its seeds."""
    return np.mean([[int(x) for x in row["right"][1:]] for row in rows if row["arm"] == arm], 0, keepdims=True)


def by_kind(rows: list[dict], problems: list[dict]) -> pd.DataFrame:
    """Return the accuracy of each arm, a mean over seeds, on kinds of test problems.

    ``problems``: for each its number of ``steps``, and whether a training question is ``near`` it, see
    ``real_model.describe``.
    """
    steps, near = (np.array([p[key] for p in problems]) for key in ("steps", "near"))
    kinds = {"1 step": steps == 1, "2 steps or more": steps > 1}
    kinds |= {"a training question is near": near == 1, "none is near": near == 0}
    table = {f"{name} ({kind.sum()})": {} for name, kind in kinds.items()}
    for arm in {row["arm"]: None for row in rows}:
        right = _outcomes(rows, arm)[0]
        for name, kind in zip(table, kinds.values(), strict=True):
            table[name][arm] = fixed(right[kind].mean())
    return pd.DataFrame(table)
