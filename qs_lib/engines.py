"""Where the points of a sweep run: processes of this machine, a Dask cluster or Slurm; one call for all three.

Each engine yields the row of a point when it is done, in any order. Dask and Slurm need a file system that all machines
share, and this repository and its environment on each of them.
"""

import contextlib
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from .errors import ParameterError, WorkbookError
from .point import run_point


def run_points(points: list[dict], engine: str = "pool", workers: int = 2, address: str = ""):
    """Rows of all ``points`` as they are done. ``engine``: ``pool``, ``dask`` (``address`` of a scheduler, or a cluster of
    ``workers`` started here) or ``slurm`` (submitit; without Slurm, and with ``address`` ``"local"``, its local executor).

    Raises ParameterError for another engine, WorkbookError where its package is missing.
    """
    if engine not in ENGINES:
        raise ParameterError(f"engine {engine!r} is unknown; it must be {', '.join(ENGINES)}")
    try:
        yield from ENGINES[engine](points, workers, address)
    except ImportError as missing:
        raise WorkbookError(f"{missing.name} is missing: install it with `pip install -e .[sweep]`, or use the pool") from None


def in_pool(points: list[dict], workers: int, address: str):
    """Fresh processes of this machine; Ctrl-C lets each save its checkpoint."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    jobs = {pool.submit(run_or_leave, point): point for point in points}
    try:
        for job in as_completed(jobs):
            yield row_of(job, jobs[job])
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_or_leave(point: dict) -> dict:
    """``run_point`` in a process that ends when it is told to stop, before it takes the next point."""
    try:
        return run_point(point)
    except (KeyboardInterrupt, SystemExit):
        os._exit(130)


def on_dask(points: list[dict], workers: int, address: str):
    """Dask runs a point again when its worker dies (three times, Dask's own setting); finished stages are kept."""
    from dask import distributed

    with contextlib.ExitStack() as stack:
        cluster = address or stack.enter_context(
            distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        )
        client = stack.enter_context(distributed.Client(cluster))
        jobs = {client.submit(run_point, point, pure=False): point for point in points}
        for job in distributed.as_completed(jobs):
            yield row_of(job, jobs[job])


def on_slurm(points: list[dict], workers: int, address: str):
    """An array of Slurm jobs, ``workers`` of them at a time, or submitit's local processes."""
    import submitit

    folder = Path(points[0]["outputs"]) / ".jobs"
    executor = submitit.AutoExecutor(folder, cluster=address or (None if shutil.which("srun") else "local"))
    executor.update_parameters(timeout_min=24 * 60, cpus_per_task=points[0]["threads"], slurm_array_parallelism=workers)
    jobs = dict(zip(executor.map_array(run_point, points), points, strict=True))
    for job in submitit.helpers.as_completed(list(jobs), poll_frequency=1):
        yield row_of(job, jobs[job])


def row_of(job, point: dict) -> dict:
    """The row of a finished job; one that died is a row with an error."""
    try:
        return job.result()
    except Exception as error:  # noqa: BLE001 (each engine has its own)
        reason = (str(error).splitlines() or [""])[0]
        return {"run": point["run"], **point["values"], "error": f"the worker died ({type(error).__name__}: {reason})"}


ENGINES = {"pool": in_pool, "dask": on_dask, "slurm": on_slurm}
