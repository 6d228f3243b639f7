"""Experiments: arms x seeds, every finished run one row of a CSV, and what the rows say.

A run that has its row is not repeated, so an experiment can be stopped and started again at any time.
"""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..files import discard, lock_run, read_rows, write_rows
from ..stats import Interval
from ..training.checkpoint import Checkpoint
from ..workbook.stage import code_hash, git_commit


def repeat(path: Path, arms: dict[str, dict], seeds, measure, defaults: dict | None = None) -> list[dict]:
    """Return the rows of all ``arms`` (name -> settings) x ``seeds``. Those missing from the CSV are made now.

    ``measure(settings, seed, checkpoint)`` trains once, from where ``checkpoint`` stopped if it uses it, and returns a
    dict of numbers (or lists of them), of which five decimals are kept. A row made with other settings under the same
    name is made again. A row that lacks a setting was made before there was one: it stands for the value in
    ``defaults``. Rows also hold ``seconds``, ``threads`` and git's ``commit``. Raises ``StageError`` on a second writer.
    """
    defaults = defaults or {}
    with lock_run(path.parent, f"experiment {path.stem}", f".{path.stem}.lock"):
        wanted = [(arm, settings, seed) for seed in seeds for arm, settings in arms.items()]
        for arm, settings, seed in (bar := tqdm(wanted, desc=path.stem)):
            bar.set_postfix_str(f"{arm}, seed {seed}")
            if row_of(read_rows(path), arm, seed, settings, defaults) is None:
                started = time.monotonic()
                identity = {"settings": settings, "seed": seed, "code": code_hash()}
                checkpoint = Checkpoint(path.with_name(f".{path.stem}.checkpoint"), identity)
                measured = {key: _rounded(value) for key, value in measure(settings, seed, checkpoint).items()}
                row = {"arm": arm, "seed": seed, "settings": settings, **measured}
                row |= {"seconds": round(time.monotonic() - started, 1), "threads": torch.get_num_threads()}
                others = [r for r in read_rows(path) if (r["arm"], r["seed"]) != (arm, seed)]
                write_rows(path, [*others, row | {"commit": git_commit()}])
                discard(checkpoint.folder)
        rows = read_rows(path)
        return [row_of(rows, arm, seed, settings, defaults) for arm, settings in arms.items() for seed in seeds]


def _rounded(value):
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(float(value), 5) if isinstance(value, float | np.floating) else value


def row_of(rows: list[dict], arm: str, seed: int, settings: dict, defaults: dict) -> dict | None:
    """Return the row of one run, if it is there and was made with these settings."""
    own = (row for row in rows if (row["arm"], row["seed"]) == (arm, seed))
    return next((row for row in own if defaults | row["settings"] == defaults | settings), None)


def verdict(against: dict[str, Interval], digits: int, verdicts: tuple[str, str, str, str]) -> str:
    """Return the gains over each control and what they show. The last two are no filter and a momentum as slow.

    The ``verdicts`` are a gain over both, a gain over no filter alone, a loss, and nothing shown.
    """
    both, plain_only, loss, nothing = verdicts
    form = f"{{}} {{:+.{digits}f}} [{{:+.{digits}f}}, {{:+.{digits}f}}]".format
    parts = [form(name, *found) for name, found in against.items()]
    plain, matched = list(against.values())[-2:]
    gained = both if matched[1] > 0 else plain_only
    return f"{'; '.join(parts)}: {gained if plain[1] > 0 else loss if plain[2] < 0 else nothing}"
