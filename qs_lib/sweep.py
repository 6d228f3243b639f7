"""``python -m qs_lib.sweep 05_rl n_true=1,2,4 seed=0,1``: notebooks x a grid of parameters, one table and one figure.

Each point is a run of its own, ``outputs/sweeps/<name>/<point>/``; finished stages are kept, so the same command goes on
where it stopped. The rows are in ``sweep.csv``, parameters and the stages' summaries side by side, the figure in
``sweep.png``. A sweep can also be a file, ``params/sweeps/<name>.yaml``.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path

from . import plots
from .engines import ENGINES, run_points
from .errors import ParameterError, WorkbookError
from .files import find_run, lock_run, outputs_root, read_rows, write_rows
from .params import check_parameters, notebook_parameters, unknown_name
from .stage import REPOSITORY
from .variants import check_variant, read_variant, read_yaml

COSTS = ("seconds", "peak_memory_mb")  # every row has them, and they differ from run to run
FILE_KEYS = {"notebooks", "variant", "grid", "x", "y"}


def read_sweep(name: str, root: Path = REPOSITORY) -> dict:
    """A sweep file, ``params/sweeps/<name>.yaml`` or a path: ``notebooks``, ``variant``, ``grid`` (parameter -> values),
    and what to plot, ``x`` and ``y``. Raises ParameterError."""
    path = Path(name) if name.endswith(".yaml") else root / "params" / "sweeps" / f"{name}.yaml"
    try:
        read = read_yaml(path)
    except FileNotFoundError:
        raise ParameterError(f"there is no sweep file {path}") from None
    if not isinstance(read, dict) or not isinstance(read.get("grid"), dict) or not isinstance(read.get("notebooks"), list):
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


def points_of(name: str, notebooks: list[Path], grid: dict[str, list], variant: str = "defaults", upstream: str = "",
              keep: bool = False, threads: int = 1, command: str = "") -> list[dict]:  # fmt: skip
    """The points of a sweep, all parameters checked, for :func:`qs_lib.point.run_point`. Raises ParameterError."""
    known = {path: notebook_parameters(path) for path in notebooks}
    for parameter in grid:
        if not any(parameter in names for names in known.values()) or parameter in ("run_name", "upstream"):
            raise ParameterError(unknown_name(parameter, {n for names in known.values() for n in names} - {"run_name", "upstream"}))
    check_variant(variant, notebooks[0].parent.parent)
    points, source = [], find_run(upstream).resolve()
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        given = []
        for path in notebooks:
            given.append(read_variant(path.stem, variant, path.parent.parent) | {k: v for k, v in values.items() if k in known[path]})
            check_parameters(path, given[-1])
        points.append({
            "run": run_name(values), "values": values, "notebooks": [str(path) for path in notebooks], "given": given,
            "outputs": str(outputs_root() / "sweeps" / name), "upstream": str(source), "keep": keep, "threads": threads,
            "command": command or f"python -m qs_lib.sweep {name}",
        })  # fmt: skip
    return points


def run_name(values: dict) -> str:
    """A folder's name for a point: ``n_true-4.seed-0``, shortened by a hash where it would be too long or unreadable."""
    plain = ".".join(f"{name}-{value}" for name, value in values.items())
    short = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)
    if short == plain and len(short) <= 64:
        return short
    return f"{short[:50]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def sweep(name: str, points: list[dict], x: str = "", y: tuple[str, ...] = (), engine: str = "pool", workers: int = 2,
          address: str = "") -> list[dict]:  # fmt: skip
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
    numbers = [k for k, v in (whole[0] if whole else {}).items() if isinstance(v, (int, float)) and k not in (*parameters, *COSTS)]
    shown = [name for name in y or numbers[:1] if any(isinstance(row.get(name), (int, float)) for row in whole)]
    lines = [name for name in parameters if name not in (x, "seed") and len({str(row.get(name)) for row in whole}) > 1]
    return plots.sweep(whole, x, shown, lines) if shown else None


def ready_made() -> list[dict]:
    """The sweeps of ``params/sweeps``, one row each: ``name``, the ``question`` its first comment asks, ``notebooks``, number
    of ``runs`` and the ``command``."""
    rows = []
    for path in sorted((REPOSITORY / "params" / "sweeps").glob("*.yaml")):
        plan, text = read_sweep(path.stem), path.read_text(encoding="utf-8")
        comment = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
        rows.append({"name": path.stem, "question": comment.partition("?")[0] + "?", "notebooks": " ".join(plan["notebooks"]),
                     "runs": math.prod(len(values) for values in plan["grid"].values()), "command": f"make sweep X={path.stem}"})  # fmt: skip
    return rows


def committed_rows(name: str) -> list[dict]:
    """The rows of a ready-made sweep that are committed with the pocket run; none where there are none."""
    return read_rows(find_run("") / "sweeps" / name / "sweep.csv")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m qs_lib.sweep", description="Notebooks x a grid of parameters.")
    parser.add_argument("what", help="a notebook (05_rl, or a path) or a sweep file (a name in params/sweeps, or a path)")
    parser.add_argument("grid", nargs="*", metavar="name=v1,v2", help="values of parameters; they replace a file's")
    parser.add_argument("--name", help="results go to outputs/sweeps/NAME; default: WHAT")
    parser.add_argument("--variant", help="params/<stage>/VARIANT.yaml for all that the grid does not set; default: the small run")
    parser.add_argument("--upstream", default="", help="run whose earlier stages are read; default: the committed pocket run")
    parser.add_argument("--engine", default="pool", choices=ENGINES)
    parser.add_argument("--address", default="", help="of a Dask scheduler, tcp://host:port; for slurm: 'local' or 'slurm'")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="points at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each point; another number changes the last digits")
    parser.add_argument("--x", default="", help="parameter on the figure's x axis; default: the first")
    parser.add_argument("--y", nargs="+", default=(), help="numbers of the summaries to plot; default: the first")
    parser.add_argument("--keep", action="store_true", help="keep finished stages although qs_lib changed")
    given = parser.parse_args(arguments)
    command = "python -m qs_lib.sweep " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        notebook = Path(given.what) if given.what.endswith(".ipynb") else REPOSITORY / "notebooks" / f"{given.what}.ipynb"
        plan = {"notebooks": [notebook], "grid": {}} if notebook.is_file() else read_sweep(given.what)
        notebooks = [path if isinstance(path, Path) else REPOSITORY / "notebooks" / f"{path}.ipynb" for path in plan["notebooks"]]
        grid = plan["grid"] | parse_grid(given.grid)
        if not grid:
            raise ParameterError("a sweep needs at least one parameter, as name=value,value")
        name = given.name or Path(given.what).stem
        points = points_of(name, [path.resolve() for path in notebooks], grid, given.variant or plan.get("variant", "defaults"),
                           given.upstream, given.keep, given.threads, command)  # fmt: skip
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
