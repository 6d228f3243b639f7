"""Experiments: arms x seeds, every finished run one row of a CSV, and what the rows say.

A run that has its row is not repeated, so an experiment can be stopped and started again at any time.
"""

import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files import discard, lock_run, read_rows, write_rows
from ..training.checkpoint import Checkpoint
from ..workbook.stage import code_hash, git_commit


def repeat(path: Path, arms: dict[str, dict], seeds, measure) -> list[dict]:
    """Rows of all ``arms`` (name -> settings) x ``seeds``, in that order; those missing from the CSV are made now.

    ``measure(settings, seed, checkpoint)`` trains once, from where ``checkpoint`` stopped if it uses it, and returns a dict
    of numbers (or lists of them). A row made with other settings under the same name is made again. Rows also hold ``seconds``, ``threads`` and the git ``commit``. Raises
    ``StageError`` when another process writes the same file.
    """
    lock = lock_run(path.parent, f"experiment {path.stem}", f".{path.stem}.lock")
    try:
        wanted = [(arm, settings, seed) for seed in seeds for arm, settings in arms.items()]
        for arm, settings, seed in (bar := tqdm(wanted, desc=path.stem)):
            bar.set_postfix_str(f"{arm}, seed {seed}")
            if row_of(read_rows(path), arm, seed, settings) is None:
                started = time.monotonic()
                identity = {"settings": settings, "seed": seed, "code": code_hash()}
                checkpoint = Checkpoint(path.with_name(f".{path.stem}.checkpoint"), identity)
                row = {"arm": arm, "seed": seed, "settings": settings, **measure(settings, seed, checkpoint)}
                row |= {"seconds": round(time.monotonic() - started, 1), "threads": torch.get_num_threads()}
                others = [r for r in read_rows(path) if (r["arm"], r["seed"]) != (arm, seed)]
                write_rows(path, [*others, row | {"commit": git_commit()}])
                discard(checkpoint.folder)
        rows = read_rows(path)
        return [row_of(rows, arm, seed, settings) for arm, settings in arms.items() for seed in seeds]
    finally:
        lock.release()


def row_of(rows: list[dict], arm: str, seed: int, settings: dict) -> dict | None:
    """The row of one run, if it is there and was made with these settings."""
    for row in rows:
        if (row["arm"], row["seed"], row["settings"]) == (arm, seed, settings):
            return row
    return None


def verdict(plain, matched, verdicts: tuple[str, str, str, str]) -> str:
    """Which of four verdicts the filter's gains, as (value, low, high), over its control without a filter and over the
    one with a momentum as slow bear out: a gain over both, over the plain one alone, a loss, nothing shown."""
    both, plain_only, loss, nothing = verdicts
    if plain[1] > 0:
        return both if matched[1] > 0 else plain_only
    return loss if plain[2] < 0 else nothing
