"""The training doctor: what the metrics of a run say about it, one sentence a rule, with the next step.

``python -m qs_lib.viewing.doctor RUN``. Rows are those of ``metrics.jsonl``, of a finished run or of one that goes on.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..errors import WorkbookError
from ..evaluation.episodes import read_episodes
from ..files import find_run
from . import rules
from .escape import safe_line

SPOKEN = {"healthy": "", "look": "LOOK: ", "sick": "SICK: ", "unknown": "cannot be told: "}


class Finding(NamedTuple):
    """What one rule found. ``verdict``: "healthy", "look", "sick", or "unknown" where the files do not tell."""

    name: str
    verdict: str
    sentence: str


def examine(rows, episodes=(), copied: float | None = None) -> list[Finding]:
    """Return a finding for each rule that fits the rows: of reinforcement, of baking, or of any training with a loss.

    ``rows``: dicts of ``metrics.jsonl``; what is no dict and what is no finite number in them is passed over.
    ``episodes``: those of the stage. ``copied``: share of validation questions that are training questions, if known.
    """
    rows = [row for row in rows if isinstance(row, dict)]
    names = set().union(*rows)
    others = rules.BAKING_RULES if names & {"thinking_use", "epoch"} else rules.PRETRAINING_RULES
    chosen = rules.REINFORCEMENT_RULES if "reward" in names else others
    if len(rows) < rules.LEAST and not len(rules.Course(rows).values("thinking_use")):
        return [Finding("rows", "unknown", f"{len(rows)} rows say nothing yet, it takes {rules.LEAST}")]
    course, findings = rules.Course(rows, list(episodes), copied), []
    for rule in chosen:
        verdict, found, *step = rule(course)
        told = ": ".join([found, *step]) if verdict in ("look", "sick") else found
        findings.append(Finding(rule.__name__.replace("_", " "), verdict, told))
    return findings


def as_lines(findings: list[Finding]) -> list[str]:
    """Return a line on each finding: its name, and its sentence where need be behind the verdict."""
    return [f"{f.name:20}{SPOKEN[f.verdict]}{f.sentence}" for f in findings]


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """Return the rows of a ``metrics.jsonl`` and how many lines are none, as the last of a run that goes on may be."""
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict)]
    return rows, len(lines) - len(rows)


def copied_questions(data: Path) -> float | None:
    """Return the share of validation questions that are training questions, None where the files are not there."""
    try:
        train, held_out = (pd.read_parquet(data / f"{s}.parquet")["question"] for s in ("train", "validation"))
    except (OSError, ValueError, KeyError):
        return None
    return float(held_out.isin(set(train)).mean()) if len(held_out) else None


def report(run: str) -> list[str]:
    """Return the lines on each training stage of a run. Raises ``WorkbookError`` if there is no run or no training."""
    folder, lines = find_run(run), []
    copied = copied_questions(folder / "02_dataset_generation")
    if not (stages := {path.parent.name for path in folder.glob("*/metrics.jsonl")}):
        raise WorkbookError(f"run {folder.name} has no training to examine; make it with `make run RUN={folder.name}`")
    for stage in sorted(stages | {"03_baking", "05_rl"}):
        if stage not in stages:
            lines.append(f"{stage}: no metrics.jsonl yet, make it with `make run RUN={folder.name} NB={stage}`")
            continue
        rows, torn = read_metrics(folder / stage / "metrics.jsonl")
        saved, episodes = folder / stage / "episodes.jsonl", []
        told = f", {torn} lines cannot be read" if torn else ""
        try:
            episodes = read_episodes(saved) if saved.is_file() else []
        except ValueError as error:
            told += f", {error}"
        lines.append(f"{stage}: {len(rows)} rows{told}")
        lines += [f"  {line}" for line in as_lines(examine(rows, episodes, copied))]
    return lines


def main(arguments: list[str]) -> int:
    """Print what the doctor says of a run, by default the committed one, and return the exit code."""
    try:
        lines = report(arguments[0] if arguments else "")
    except (WorkbookError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*map(safe_line, lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
