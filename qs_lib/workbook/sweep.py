"""``python -m qs_lib.workbook.sweep 05_rl n_true=1,2,4 seed=0,1``: notebooks x a grid of parameters.

Each point of the grid is a run of its own, ``outputs/sweeps/<name>/<point>/``. Finished stages are kept, so the same
command goes on where it stopped. The rows are in ``sweep.csv``, parameters and the stages' summaries side by side, the
figure in ``sweep.png``. A sweep can also be a file, ``params/sweeps/<name>.yaml``.
"""

import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from concurrent import futures
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from .. import files
from ..errors import ParameterError, WorkbookError
from ..files import REPOSITORY, find_run, lock_run, outputs_root, read_rows
from ..settings import unknown_name
from ..stats import as_text
from . import figures
from .params import check_parameters, notebook_parameters, read_variant, read_yaml
from .run import NOT_SETTABLE, exit_code, parsed, run_stage

COSTS = ("seconds", "peak_memory_mb")  # every row has them, and they differ from run to run
FILE_KEYS = {"notebooks", "variant", "grid", "x", "y"}
LOCK_WAIT = 30.0  # seconds that a killed worker's kernel may take to end and free its run


def read_sweep(name: str) -> dict:
    """Return a sweep file, ``params/sweeps/<name>.yaml`` or a path. Raises ``ParameterError``.

    It holds ``notebooks``, ``variant``, ``grid`` (parameter -> values), and what to plot, ``x`` and ``y``.
    """
    path = Path(name) if name.endswith(".yaml") else REPOSITORY / "params" / "sweeps" / f"{name}.yaml"
    try:
        read = read_yaml(path)
    except FileNotFoundError:
        raise ParameterError(f"there is no sweep file {path}") from None
    kinds = {"grid": dict, "notebooks": list}
    if not isinstance(read, dict) or not all(isinstance(read.get(key), kind) for key, kind in kinds.items()):
        raise ParameterError(f"{path} must have the lists 'notebooks' and, under 'grid', 'parameter: [values]'")
    for key in set(read) - FILE_KEYS:
        raise ParameterError(f"{path}: {unknown_name(str(key), FILE_KEYS)}")
    return read | {"grid": {k: v if isinstance(v, list) else [v] for k, v in read["grid"].items()}}


def parse_grid(words: list[str]) -> dict[str, list]:
    """Return ``{"n_true": [1, 2]}`` for ``["n_true=1,2"]``. Raises ``ParameterError`` for another form."""
    grid = {}
    for word in words:
        name, mark, text = word.partition("=")
        if not mark or not text:
            raise ParameterError(f"{word!r} is not of the form name=value,value")
        if name in grid:
            raise ParameterError(f"{name} is given twice: write all its values behind one =, with commas")
        try:
            grid[name] = json.loads(f"[{text}]")
        except ValueError:
            grid[name] = [files.json_or_text(part) for part in text.split(",")]
    return grid


def points_of(
    name: str, notebooks: list[Path], grid: dict[str, list], variant="defaults", upstream="", keep=False, threads=1
) -> list[dict]:
    """Return the points of a sweep for :func:`run_point`, all parameters checked. Raises ``ParameterError``."""
    known = {path: notebook_parameters(path).keys() - NOT_SETTABLE for path in notebooks}
    for parameter in grid:
        if not any(parameter in names for names in known.values()):
            raise ParameterError(unknown_name(parameter, set().union(*known.values())))
    shared = {"outputs": str(outputs_root() / "sweeps" / name), "upstream": str(find_run(upstream).resolve())}
    shared |= {"keep": keep, "threads": threads, "command": f"python -m qs_lib.workbook.sweep {name}"}
    points, fixed = [], {path: read_variant(variant, path.parent.parent).get(path.stem, {}) for path in notebooks}
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        given = {str(path): fixed[path] | {k: v for k, v in values.items() if k in known[path]} for path in notebooks}
        for path, own in given.items():
            check_parameters(path, own)
        points.append({"run": point_name(values), "values": values, "given": given, **shared})
    return points


def point_name(values: dict) -> str:
    """Return the folder's name of a point: ``n_true-4.seed-0``, with a hash where that is too long or unreadable."""
    plain = ".".join(f"{name}-{value}" for name, value in values.items())
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)
    if readable == plain and len(plain) <= 64:
        return plain
    return f"{readable[:50]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def run_sweep(name: str, points: list[dict], x="", y=(), **engine) -> list[dict]:
    """Run all points and return their rows in the order of ``points``. The table is written anew after each.

    ``x``: the parameter and ``y``: the numbers to plot (:func:`figure`). ``engine``: what :func:`run_points` takes.
    Raises ``StageError`` if another process runs the same sweep, ``WorkbookError`` for an engine that is not there.
    """
    folder, parameters = Path(points[0]["outputs"]), list(points[0]["values"])
    with lock_run(folder, f"sweep {name}"):
        done, order = {}, [point["run"] for point in points]
        for row in run_points(points, **engine):
            done[row["run"]] = row
            rows = [done[run] for run in order if run in done]
            files.write_rows(folder / "sweep.csv", rows)
            numbers = [f"{key} {as_text(row[key])}" for key in y if isinstance(row.get(key), (int, float))]
            told = row.get("error") or ", ".join([*numbers, f"{row['seconds']:.0f} s"])
            print(f"[{len(done)}/{len(order)}] {row['run']}: {told}", flush=True)
        if drawn := figure(rows, x or parameters[0], y, parameters):
            with files.atomic_write(folder / "sweep.png") as temporary:
                drawn.savefig(temporary, format="png")
        return rows


def figure(rows: list[dict], x: str, y: tuple[str, ...] | list[str], parameters: list[str]):
    """Return the figure of a sweep, a line per combination that varies, or None where no row has a number."""
    whole = [row for row in rows if "error" not in row]
    first = {k: v for k, v in (whole[0] if whole else {}).items() if k not in (*parameters, *COSTS)}
    numbers = [k for k, v in first.items() if isinstance(v, (int, float))]
    shown = [name for name in y or numbers[:1] if any(isinstance(row.get(name), (int, float)) for row in whole)]
    lines = [name for name in parameters if name not in (x, "seed") and len({str(row.get(name)) for row in whole}) > 1]
    return figures.sweep_panels(whole, x, shown, lines) if shown else None


def ready_made() -> list[dict]:
    """Return a row for each of ``params/sweeps``: name, question (its first comment), notebooks, runs, command."""
    rows = []
    for path in sorted((REPOSITORY / "params" / "sweeps").glob("*.yaml")):
        plan, comment = read_sweep(path.stem), path.read_text(encoding="utf-8").partition("?")[0]
        question = " ".join(line.lstrip("# ") for line in comment.splitlines()) + "?"
        row = {"name": path.stem, "question": question, "notebooks": " ".join(plan["notebooks"])}
        runs = math.prod(map(len, plan["grid"].values()))
        rows.append(row | {"runs": runs, "command": f"make sweep X={path.stem}"})
    return rows


def committed_rows(name: str) -> list[dict]:
    """Return the rows of a ready-made sweep that are committed with the pocket run, if there are any."""
    return read_rows(find_run("") / "sweeps" / name / "sweep.csv")


def run_points(points: list[dict], engine: str = "pool", workers: int = 2, address: str = ""):
    """Yield the rows of all ``points`` as they are done.

    ``engine``: ``pool``, ``dask`` (``address`` of a scheduler, or a cluster of ``workers`` started here) or ``slurm``
    (submitit's local executor without Slurm, and for ``address`` ``"local"``). Raises ``ParameterError`` for another
    engine, ``WorkbookError`` if its package is missing.
    """
    if engine not in ENGINES:
        raise ParameterError(f"engine {engine!r} is unknown; it must be {', '.join(ENGINES)}")
    try:
        yield from ENGINES[engine](points, workers, address)
    except ImportError as missing:
        install = "install it with `pip install -e .[sweep]`, or use the pool"
        raise WorkbookError(f"{missing.name} is missing: {install}") from None


def in_pool(points: list[dict], workers: int, address: str):
    """Run points in fresh processes of this machine. Ctrl-C lets each save its checkpoint."""
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    jobs = {pool.submit(run_or_leave, point): point for point in points}
    try:
        for job in futures.as_completed(jobs):
            yield result_of(job, jobs[job])
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_or_leave(point: dict) -> dict:
    """Run a point in a process that ends when it is told to stop, before it takes the next one."""
    try:
        return run_point(point)
    except (KeyboardInterrupt, SystemExit):
        os._exit(130)


def on_dask(points: list[dict], workers: int, address: str):
    """Run points on Dask, which repeats one whose worker dies (three times, its own setting) and keeps its stages."""
    from dask import distributed

    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.Client(address) if address else distributed.Client(**local) as client:
        jobs = {client.submit(run_point, point, pure=False): point for point in points}
        for job in distributed.as_completed(jobs):
            yield result_of(job, jobs[job])


def on_slurm(points: list[dict], workers: int, address: str):
    """Run points as an array of Slurm jobs, ``workers`` of them at a time, or as submitit's local processes."""
    import submitit

    folder = Path(points[0]["outputs"]) / ".jobs"
    executor = submitit.AutoExecutor(folder, cluster=address or (None if shutil.which("srun") else "local"))
    executor.update_parameters(timeout_min=24 * 60, cpus_per_task=points[0]["threads"], slurm_array_parallelism=workers)
    jobs = dict(zip(executor.map_array(run_point, points), points, strict=True))
    for job in submitit.helpers.as_completed(list(jobs), poll_frequency=1):
        yield result_of(job, jobs[job])


ENGINES = {"pool": in_pool, "dask": on_dask, "slurm": on_slurm}


def result_of(job, point: dict) -> dict:
    """Return the row of a finished job. One that died is a row with an error."""
    try:
        return job.result()
    except Exception as error:  # noqa: BLE001 (each engine has its own)
        reason = (str(error).splitlines() or [""])[0]
        return {"run": point["run"], **point["values"], "error": f"the worker died ({type(error).__name__}: {reason})"}


def run_point(point: dict) -> dict:
    """Run what is not finished of a point and return its row.

    ``point``: ``run`` (name), ``outputs`` (folder of all points), ``upstream`` (folder of the run that earlier stages
    are read from), ``given`` (path of a notebook -> its parameters, in order), ``values`` (of the grid), ``keep``,
    ``threads`` and ``command``. The row: ``run``, the grid's values, the stages' summaries, ``seconds``,
    ``peak_memory_mb``, and the ``command``, ``commit`` and kind of ``machine`` that made it, or the ``error``.
    The process works on one point at a time.
    """
    row, set_here = {"run": point["run"], **point["values"]}, {"QS_OUTPUTS": point["outputs"]}
    os.environ |= set_here | {"OMP_NUM_THREADS": str(point["threads"]), "QS_COMMAND": point["command"]}
    try:
        run = files.run_folder(point["run"])
        with lock_run(run, "a sweep", ".driver.lock", LOCK_WAIT):
            with lock_run(run, "a sweep", wait=LOCK_WAIT):
                link_upstream(run, Path(point["upstream"]), [Path(notebook).stem for notebook in point["given"]])
            with open(run / ".log", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
                return row | _run_stages(point, run)
    except (WorkbookError, OSError) as error:
        return row | {"error": str(error).splitlines()[0]}


def _run_stages(point: dict, run: Path) -> dict:
    """Run the point's notebooks and return its part of the row. A name that is taken gets its stage's in front."""
    found = {"seconds": 0.0, "peak_memory_mb": 0}
    for notebook, given in point["given"].items():
        notebook, given = Path(notebook), given | {"run_name": point["run"], "upstream": point["run"]}
        record = run_stage(notebook, run, given, keep=point["keep"])
        taken = {*found, *point["values"]}
        plain = {k: v for k, v in record["summary"].items() if isinstance(v, (bool, int, float, str))}
        found |= {f"{notebook.stem}.{k}" if k in taken else k: v for k, v in plain.items()}
        found["seconds"] = round(found["seconds"] + record["wall_s"], 1)
        found["peak_memory_mb"] = max(found["peak_memory_mb"], record.get("peak_memory_mb") or 0)
    machine = f"{record['device']} ({record['device_name']}, {point['threads']} threads)"
    return found | {"command": record["command"], "commit": record["git_commit"] or "no commit", "machine": machine}


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


SWEEP_OPTIONS = {  # of the command line
    "what": {"help": "a notebook (05_rl, or a path) or a sweep file (a name in params/sweeps, or a path)"},
    "grid": {"nargs": "*", "metavar": "name=v1,v2", "help": "values of parameters; they replace a file's"},
    "--name": {"help": "results go to outputs/sweeps/NAME; default: WHAT"},
    "--variant": {"help": "params/<stage>/VARIANT.yaml for all that the grid does not set; default: the small run"},
    "--upstream": {"default": "", "help": "run whose earlier stages are read; default: the committed pocket run"},
    "--engine": {"default": "pool", "choices": ENGINES},
    "--address": {"default": "", "help": "of a Dask scheduler, tcp://host:port; for slurm: 'local' or 'slurm'"},
    "--workers": {"type": int, "default": os.cpu_count() or 1, "help": "points at a time"},
    "--threads": {"type": int, "default": 1, "help": "of each point; another number changes the last digits"},
    "--x": {"default": "", "help": "parameter on the figure's x axis; default: the first"},
    "--y": {"nargs": "+", "default": (), "help": "numbers of the summaries to plot; default: the first"},
    "--keep": {"action": "store_true", "help": "keep finished stages although the code behind their numbers changed"},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = parsed("python -m qs_lib.workbook.sweep", "Notebooks x a grid of parameters.", SWEEP_OPTIONS, arguments)
    folder = REPOSITORY / "notebooks"

    def work():
        notebook = Path(given.what) if given.what.endswith(".ipynb") else folder / f"{given.what}.ipynb"
        plan = {"grid": {}} if notebook.is_file() else read_sweep(given.what)
        notebooks = [folder / f"{stage}.ipynb" for stage in plan.get("notebooks", ())] or [notebook.resolve()]
        if not (grid := plan["grid"] | parse_grid(given.grid)):
            raise ParameterError("a sweep needs at least one parameter, as name=value,value")
        name, variant = given.name or Path(given.what).stem, given.variant or plan.get("variant", "defaults")
        points = points_of(name, notebooks, grid, variant, given.upstream, given.keep, given.threads)
        points = [point | {"command": given.command} for point in points]
        x, y = given.x or plan.get("x", ""), tuple(given.y) or tuple(plan.get("y", ()))
        print(f"sweep {name}: {len(points)} points, {given.engine}", flush=True)
        rows = run_sweep(name, points, x, y, engine=given.engine, workers=given.workers, address=given.address)
        print(f"table and figure: {points[0]['outputs']}")
        return int(any("error" in row for row in rows))

    return exit_code(work, "the same command continues")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the workers save and leave
    sys.exit(importlib.import_module("qs_lib.workbook.sweep").main())  # workers find its functions there
