"""Experiments: arms x seeds, every finished run one row of a CSV, and what the rows say.

A run that has its row is not repeated, so an experiment can be stopped and started again at any time.
"""

import csv
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .files import discard, lock_run, to_json, write_bytes
from .origin import code_hash, git_commit


def read_rows(path: Path) -> list[dict]:
    """The rows of an experiment's CSV, numbers and lists as such; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: _cell(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _cell(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write the rows aside and rename. A cell is text or JSON; columns are those of all rows, in order of appearance."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    table.writeheader()
    table.writerows({k: v if isinstance(v, str) else to_json(v) for k, v in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.getvalue().encode())


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


def seed_interval(values, confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): Student's t interval over seeds, for what another seed would give on average.

    Not over problems: the test problems are the same for all. Raises ``ValueError`` below two seeds.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def column(rows: list[dict], arm: str, key: str) -> list[float]:
    """One number of an arm's rows, ordered by seed, so that arms can be subtracted seed by seed."""
    return [row[key] for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == arm]


def difference(rows: list[dict], arm: str, control: str, key: str) -> tuple[float, float, float]:
    """``arm`` minus ``control``, paired by seed, with :func:`seed_interval`.

    Raises ``ValueError`` unless both were run on the same seeds and on the same ``data``, where rows name them: the
    run they read from may have been made anew between two rows.
    """
    ran = [sorted((r["seed"], r.get("data", "")) for r in rows if r["arm"] == name) for name in (arm, control)]
    if ran[0] != ran[1]:
        raise ValueError(f"{arm} and {control} were not run on the same seeds and data")
    return seed_interval(np.subtract(column(rows, arm, key), column(rows, control, key)))


def verdict(plain, matched, verdicts: tuple[str, str, str, str]) -> str:
    """Which of four verdicts the filter's gains, as (value, low, high), over its control without a filter and over the
    one with a momentum as slow bear out: a gain over both, over the plain one alone, a loss, nothing shown."""
    both, plain_only, loss, nothing = verdicts
    if plain[1] > 0:
        return both if matched[1] > 0 else plain_only
    return loss if plain[2] < 0 else nothing
