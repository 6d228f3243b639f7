"""One point of a sweep: its notebooks executed in a run folder of its own, by whichever process is asked to."""

import contextlib
import os
import time
from pathlib import Path

from .errors import StageError, WorkbookError
from .files import lock_run, run_folder
from .params import check_parameters
from .run import run_stage

PATIENCE = 30.0  # seconds that a killed worker's kernel may take to end and free its run


def run_point(point: dict) -> dict:
    """Run what is not finished of a point; returns its row: ``run``, the grid's values, the stages' summaries, ``seconds``,
    ``peak_memory_mb``, and the ``command``, ``commit`` and kind of ``machine`` that made it.

    ``point``: ``run`` (name), ``outputs`` (folder of all points), ``upstream`` (folder of the run that earlier stages are
    read from), ``notebooks`` (paths, in order), ``given`` (parameters of each), ``values`` (of the grid), ``keep``,
    ``threads`` and ``command``. What goes wrong is the row's ``error``. The process works on one point at a time.
    """
    row = {"run": point["run"], **point["values"]}
    os.environ |= {"QS_OUTPUTS": point["outputs"], "OMP_NUM_THREADS": str(point["threads"]), "QS_COMMAND": point["command"]}
    try:
        run = run_folder(point["run"])
        lock = patiently(run, ".driver.lock")
        try:
            patiently(run, ".lock").release(force=True)
            link_upstream(run, Path(point["upstream"]), [Path(notebook).stem for notebook in point["notebooks"]])
            with open(run / ".log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                return row | _stages(point, run)
        finally:
            lock.release(force=True)
    except (WorkbookError, OSError) as error:
        return row | {"error": str(error).splitlines()[0]}


def _stages(point: dict, run: Path) -> dict:
    found = {"seconds": 0.0, "peak_memory_mb": 0}
    for notebook, given in zip(map(Path, point["notebooks"]), point["given"], strict=True):
        given = given | {"run_name": point["run"], "upstream": point["run"]}
        record = run_stage(notebook, run, given, check_parameters(notebook, given), keep=point["keep"])
        numbers = {k: v for k, v in record["summary"].items() if isinstance(v, (bool, int, float, str))}
        found |= {k if k not in found and k not in point["values"] else f"{notebook.stem}.{k}": v for k, v in numbers.items()}
        found["seconds"] = round(found["seconds"] + record["wall_s"], 1)
        found["peak_memory_mb"] = max(found["peak_memory_mb"], record.get("peak_memory_mb") or 0)
    machine = f"{record['device']} ({record['device_name']}, {point['threads']} threads)"
    return found | {"command": record["command"], "commit": record["git_commit"] or "no commit", "machine": machine}


def patiently(run: Path, name: str):
    """The lock ``name`` of a run folder; a killed worker's kernel holds it a moment longer. Raises StageError."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return lock_run(run, "a sweep", name)
        except StageError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def link_upstream(run: Path, upstream: Path, stages: list[str]) -> None:
    """Let ``run`` have the stages of ``upstream`` that come before its own first one, as links."""
    for stage in stages:
        if (run / stage).is_symlink():  # never write into another run
            (run / stage).unlink()
    for earlier in upstream.glob("[0-9][0-9]_*"):
        link = run / earlier.name
        if earlier.name < min(stages) and (link.is_symlink() or not link.exists()):
            link.unlink(missing_ok=True)
            link.symlink_to(earlier.resolve())
