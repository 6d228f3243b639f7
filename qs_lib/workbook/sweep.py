"""``python -m qs_lib.workbook.sweep 05_rl n_true=1,2,4 seed=0,1``: notebooks x a grid of parameters, one table and one figure.

Each point is a run of its own, ``outputs/sweeps/<name>/<point>/``; finished stages are kept, so the same command goes on
where it stopped. The rows are in ``sweep.csv``, parameters and the stages' summaries side by side, the figure in
``sweep.png``. A sweep can also be a file, ``params/sweeps/<name>.yaml``.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from ..errors import ParameterError, StageError, WorkbookError
from ..files import REPOSITORY, find_run, lock_run, outputs_root, read_rows, run_folder, write_rows
from ..settings import unknown_name
from . import figures
from .params import check_parameters, check_variant, notebook_parameters, read_variant, read_yaml
from .run import run_stage

COSTS = ("seconds", "peak_memory_mb")  # every row has them, and they differ from run to run
FILE_KEYS = {"notebooks", "variant", "grid", "x", "y"}
PATIENCE = 30.0  # seconds that a killed worker's kernel may take to end and free its run


def read_sweep(name: str, root: Path = REPOSITORY) -> dict:
    """A sweep file, ``params/sweeps/<name>.yaml`` or a path: ``notebooks``, ``variant``, ``grid`` (parameter -> values),
    and what to plot, ``x`` and ``y``. Raises ParameterError."""
    path = Path(name) if name.endswith(".yaml") else root / "params" / "sweeps" / f"{name}.yaml"
    try:
        read = read_yaml(path)
    except FileNotFoundError:
        raise ParameterError(f"there is no sweep file {path}") from None
    if (
        not isinstance(read, dict)
        or not isinstance(read.get("grid"), dict)
        or not isinstance(read.get("notebooks"), list)
    ):
        raise ParameterError(f"{path} must have the lists 'notebooks' and, under 'grid', 'parameter: [values]'")
    for key in set(read) - FILE_KEYS:
        raise ParameterError(f"{path}: {unknown_name(str(key), FILE_KEYS)}")
    return read | {"grid": {k: v if isinstance(v, list) else [v] for k, v in read["grid"].items()}}


def parse_grid(words: list[str]) -> dict[str, list]:
    """``["n_true=1,2", "mixing=hidden"]`` -> ``{"n_true": [1, 2], "mixing": ["hidden"]}``. Raises ParameterError."""
    grid = {}
    for word in words:
        name, mark, text = word.partition("=")
        if not mark or not text:
            raise ParameterError(f"{word!r} is not of the form name=value,value")
        try:
            grid[name] = json.loads(f"[{text}]")
        except ValueError:
            grid[name] = [_value(part) for part in text.split(",")]
    return grid


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def points_of(
    name: str,
    notebooks: list[Path],
    grid: dict[str, list],
    variant: str = "defaults",
    upstream: str = "",
    keep: bool = False,
    threads: int = 1,
    command: str = "",
) -> list[dict]:
    """The points of a sweep, all parameters checked, for :func:`qs_lib.workbook.sweep.run_point`. Raises ParameterError."""
    known = {path: notebook_parameters(path) for path in notebooks}
    for parameter in grid:
        if not any(parameter in names for names in known.values()) or parameter in ("run_name", "upstream"):
            raise ParameterError(
                unknown_name(parameter, {n for names in known.values() for n in names} - {"run_name", "upstream"})
            )
    check_variant(variant, notebooks[0].parent.parent)
    points, source = [], find_run(upstream).resolve()
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        given = []
        for path in notebooks:
            given.append(
                read_variant(path.stem, variant, path.parent.parent)
                | {k: v for k, v in values.items() if k in known[path]}
            )
            check_parameters(path, given[-1])
        points.append(
            {
                "run": run_name(values),
                "values": values,
                "notebooks": [str(path) for path in notebooks],
                "given": given,
                "outputs": str(outputs_root() / "sweeps" / name),
                "upstream": str(source),
                "keep": keep,
                "threads": threads,
                "command": command or f"python -m qs_lib.workbook.sweep {name}",
            }
        )
    return points


def run_name(values: dict) -> str:
    """A folder's name for a point: ``n_true-4.seed-0``, shortened by a hash where it would be too long or unreadable."""
    plain = ".".join(f"{name}-{value}" for name, value in values.items())
    short = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)
    if short == plain and len(short) <= 64:
        return short
    return f"{short[:50]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def sweep(
    name: str,
    points: list[dict],
    x: str = "",
    y: tuple[str, ...] = (),
    engine: str = "pool",
    workers: int = 2,
    address: str = "",
) -> list[dict]:
    """Run all points, the table and the figure written anew after each; rows in the order of ``points``.

    Raises StageError when another process runs the same sweep, WorkbookError for an engine that is not there.
    """
    folder = Path(points[0]["outputs"])
    lock = lock_run(folder, f"sweep {name}")
    try:
        done, order = {}, [point["run"] for point in points]
        for row in run_points(points, engine, workers, address):
            done[row["run"]] = row
            rows = [done[run] for run in order if run in done]
            write_rows(folder / "sweep.csv", rows)
            print(f"[{len(done)}/{len(order)}] {row['run']}: {row.get('error') or _shown(row, y)}", flush=True)
        draw(folder / "sweep.png", rows, x or next(iter(points[0]["values"])), y, list(points[0]["values"]))
        return rows
    finally:
        lock.release(force=True)


def _shown(row: dict, y: tuple[str, ...]) -> str:
    words = [f"{name} {row[name]:.3g}" for name in y if isinstance(row.get(name), (int, float))]
    return ", ".join([*words, f"{row['seconds']:.0f} s"])


def draw(path: Path, rows: list[dict], x: str, y: tuple[str, ...], parameters: list[str]) -> None:
    """Save the :func:`figure` of a sweep, if there is anything to draw."""
    drawn = figure(rows, x, y, parameters)
    if drawn:
        temporary = path.with_name(f".{path.name}")
        drawn.savefig(temporary, format="png")
        os.replace(temporary, path)


def figure(rows: list[dict], x: str, y: tuple[str, ...] | list[str], parameters: list[str]):
    """The figure of a sweep, by default of the first number of the summaries; None where no row has a number. A line for each
    combination of the ``parameters`` that vary, but ``x`` and the seed."""
    whole = [row for row in rows if "error" not in row]
    numbers = [
        k
        for k, v in (whole[0] if whole else {}).items()
        if isinstance(v, (int, float)) and k not in (*parameters, *COSTS)
    ]
    shown = [name for name in y or numbers[:1] if any(isinstance(row.get(name), (int, float)) for row in whole)]
    lines = [name for name in parameters if name not in (x, "seed") and len({str(row.get(name)) for row in whole}) > 1]
    return figures.sweep_panels(whole, x, shown, lines) if shown else None


def ready_made() -> list[dict]:
    """The sweeps of ``params/sweeps``, one row each: ``name``, the ``question`` its first comment asks, ``notebooks``, number
    of ``runs`` and the ``command``."""
    rows = []
    for path in sorted((REPOSITORY / "params" / "sweeps").glob("*.yaml")):
        plan, text = read_sweep(path.stem), path.read_text(encoding="utf-8")
        comment = " ".join(
            line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
        )
        rows.append(
            {
                "name": path.stem,
                "question": comment.partition("?")[0] + "?",
                "notebooks": " ".join(plan["notebooks"]),
                "runs": math.prod(len(values) for values in plan["grid"].values()),
                "command": f"make sweep X={path.stem}",
            }
        )
    return rows


def committed_rows(name: str) -> list[dict]:
    """The rows of a ready-made sweep that are committed with the pocket run; none where there are none."""
    return read_rows(find_run("") / "sweeps" / name / "sweep.csv")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qs_lib.workbook.sweep", description="Notebooks x a grid of parameters."
    )
    parser.add_argument(
        "what", help="a notebook (05_rl, or a path) or a sweep file (a name in params/sweeps, or a path)"
    )
    parser.add_argument("grid", nargs="*", metavar="name=v1,v2", help="values of parameters; they replace a file's")
    parser.add_argument("--name", help="results go to outputs/sweeps/NAME; default: WHAT")
    parser.add_argument(
        "--variant", help="params/<stage>/VARIANT.yaml for all that the grid does not set; default: the small run"
    )
    parser.add_argument(
        "--upstream", default="", help="run whose earlier stages are read; default: the committed pocket run"
    )
    parser.add_argument("--engine", default="pool", choices=ENGINES)
    parser.add_argument(
        "--address", default="", help="of a Dask scheduler, tcp://host:port; for slurm: 'local' or 'slurm'"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="points at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each point; another number changes the last digits")
    parser.add_argument("--x", default="", help="parameter on the figure's x axis; default: the first")
    parser.add_argument("--y", nargs="+", default=(), help="numbers of the summaries to plot; default: the first")
    parser.add_argument("--keep", action="store_true", help="keep finished stages although qs_lib changed")
    given = parser.parse_args(arguments)
    command = "python -m qs_lib.workbook.sweep " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        notebook = (
            Path(given.what) if given.what.endswith(".ipynb") else REPOSITORY / "notebooks" / f"{given.what}.ipynb"
        )
        plan = {"notebooks": [notebook], "grid": {}} if notebook.is_file() else read_sweep(given.what)
        notebooks = [
            path if isinstance(path, Path) else REPOSITORY / "notebooks" / f"{path}.ipynb" for path in plan["notebooks"]
        ]
        grid = plan["grid"] | parse_grid(given.grid)
        if not grid:
            raise ParameterError("a sweep needs at least one parameter, as name=value,value")
        name = given.name or Path(given.what).stem
        points = points_of(
            name,
            [path.resolve() for path in notebooks],
            grid,
            given.variant or plan.get("variant", "defaults"),
            given.upstream,
            given.keep,
            given.threads,
            command,
        )
        y = tuple(given.y) or tuple(plan.get("y", ()))
        print(f"sweep {name}: {len(points)} points, {given.engine}", flush=True)
        rows = sweep(name, points, given.x or plan.get("x", ""), y, given.engine, given.workers, given.address)
        print(f"table and figure: {points[0]['outputs']}")
    except WorkbookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as stopped:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130 if isinstance(stopped, KeyboardInterrupt) else stopped.code
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the workers save and leave
    sys.exit(main())


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
        raise WorkbookError(
            f"{missing.name} is missing: install it with `pip install -e .[sweep]`, or use the pool"
        ) from None


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


def run_point(point: dict) -> dict:
    """Run what is not finished of a point; returns its row: ``run``, the grid's values, the stages' summaries, ``seconds``,
    ``peak_memory_mb``, and the ``command``, ``commit`` and kind of ``machine`` that made it.

    ``point``: ``run`` (name), ``outputs`` (folder of all points), ``upstream`` (folder of the run that earlier stages are
    read from), ``notebooks`` (paths, in order), ``given`` (parameters of each), ``values`` (of the grid), ``keep``,
    ``threads`` and ``command``. What goes wrong is the row's ``error``. The process works on one point at a time.
    """
    row = {"run": point["run"], **point["values"]}
    os.environ |= {
        "QS_OUTPUTS": point["outputs"],
        "OMP_NUM_THREADS": str(point["threads"]),
        "QS_COMMAND": point["command"],
    }
    try:
        run = run_folder(point["run"])
        lock = patiently(run, ".driver.lock")
        try:
            patiently(run, ".lock").release(force=True)
            link_upstream(run, Path(point["upstream"]), [Path(notebook).stem for notebook in point["notebooks"]])
            with (
                open(run / ".log", "a", encoding="utf-8") as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
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
        found |= {
            k if k not in found and k not in point["values"] else f"{notebook.stem}.{k}": v for k, v in numbers.items()
        }
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
