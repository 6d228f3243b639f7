"""Run the notebooks in order: ``python -m qs_lib.workbook.run --variant pocket``.

Each notebook is executed by papermill into ``outputs/<run>/<stage>/``. A stage is skipped only if its
``run.json`` still holds (see :mod:`qs_lib.workbook.stage`); papermill's own "completed" is not believed.
"""

import argparse
import json
import os
import shlex
import sys
import traceback
from pathlib import Path

import yaml

from ..errors import ParameterError, StageError, WorkbookError
from ..files import REPOSITORY, find_run, lock_run, run_folder
from ..settings import unknown_name
from .execute import execute, shown_path
from .params import check_parameters, check_variant, notebook_parameters, read_variant
from .stage import notebook_hash, read_stage, stage_finished


def stage_notebooks(folder: Path) -> list[Path]:
    """The chain, 01 to 08, in order; 00_start_here is a tour of it, and 09_scale is about machines."""
    return sorted(folder.glob("0[1-8]_*.ipynb"))


def given_parameters(
    notebook: Path, variant: str, run_name: str, data: str | None, seed: int | None, champion: str | None = None
) -> dict:
    """What this run sets: ``params/<stage>/<variant>.yaml`` and the command line's; not checked yet.

    Raises ParameterError if the file is not a flat YAML mapping or there is nothing at ``data``.
    """
    given = read_variant(notebook.stem, variant, notebook.parent.parent)
    given |= {"run_name": run_name, "upstream": run_name}
    if seed is not None:
        given["seed"] = seed
    if data and "data" in notebook_parameters(notebook):
        path = Path(data).expanduser().resolve()
        if not path.exists():
            raise ParameterError(f"there is no file or folder {path} to read data from")
        given["data"] = str(path)
    if champion and "champion" in notebook_parameters(notebook):
        path = Path(champion).expanduser()
        given["champion"] = str(path.resolve()) if path.exists() else champion
    return given


def named_stages(notebooks: list[Path], names: list[str]) -> list[Path]:
    """The notebooks of these stages, each given as ``05_rl`` or ``05``. Raises ParameterError for another name."""
    for name in names:
        if not any(name in (path.stem, path.stem.split("_")[0]) for path in notebooks):
            raise ParameterError(unknown_name(name, [path.stem for path in notebooks]).replace("parameter", "stage", 1))
    return [path for path in notebooks if path.stem in names or path.stem.split("_")[0] in names]


def overrides(notebooks: list[Path], words: list[str]) -> dict[Path, dict]:
    """Notebook -> what ``words`` set in it: ``steps=4`` wherever there is such a parameter, ``05_rl.steps=4`` in that one alone.

    Values are read as YAML; the word for one notebook wins over that for all. Raises ParameterError.
    """
    found = {path: {} for path in notebooks}
    for word in sorted(words, key=lambda word: "." in word.partition("=")[0]):
        name, mark, text = word.partition("=")
        stage, _, name = name.rpartition(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if not mark or value is None or isinstance(value, dict):
            raise ParameterError(f"{word!r} is not of the form name=value, or stage.name=value for one notebook")
        known = {
            path: notebook_parameters(path).keys() - {"run_name", "upstream"}
            for path in (named_stages(notebooks, [stage]) if stage else notebooks)
        }
        if not any(name in names for names in known.values()):
            raise ParameterError(unknown_name(name, set().union(*known.values())))
        for path in (path for path in known if name in known[path]):
            found[path][name] = value
    return found


def run_stages(
    variant: str,
    run_name: str,
    notebooks: Path | None = None,
    data: str | None = None,
    seed: int | None = None,
    only: list[str] | None = None,
    fresh: bool = False,
    keep: bool = False,
    debug: bool = False,
    champion: str | None = None,
    given_words: list[str] = (),
) -> Path:
    """Execute every stage of a run that is not finished yet, in order; returns the run folder.

    ``champion``: folder or Hugging Face name of a model in place of the variant's; ``only``: names of stages, or their numbers; ``fresh``: repeat finished ones; ``keep``: do not repeat them as
    ``qs_lib`` changed; ``given_words``: parameters in place of the variant's, see :func:`overrides`.

    Raises WorkbookError in one sentence.
    """
    notebooks = notebooks or REPOSITORY / "notebooks"
    chosen = stage_notebooks(notebooks)
    if not chosen:
        raise StageError(f"there are no notebooks in {notebooks}")
    check_variant(variant, notebooks.parent)
    chosen = named_stages(chosen, only) if only else chosen
    changed = overrides(chosen, given_words)
    given = {path: given_parameters(path, variant, run_name, data, seed, champion) | changed[path] for path in chosen}
    values = {path: check_parameters(path, given[path]) for path in chosen}  # all, before the first minute is spent

    run = run_folder(run_name)
    lock = lock_run(run, "make run", ".driver.lock")
    try:
        print(f"run {run_name}: {len(chosen)} stages into {shown_path(run)}", flush=True)
        for path in chosen:
            run_stage(path, run, given[path], values[path], fresh, keep, debug)
    finally:
        lock.release(force=True)
    return run


def run_stage(
    path: Path, run: Path, given: dict, values: dict, fresh: bool = False, keep: bool = False, debug: bool = False
) -> dict:
    """Execute one notebook into ``run`` unless its stage there is finished; returns the stage's record.

    ``given``: what differs from the notebook's defaults, ``values``: all parameters, checked. Raises StageError.
    """
    source = notebook_hash(path)
    upstream = find_run(values["upstream"])
    finished, reason = stage_finished(run / path.stem, values, source, upstream, check_code=not keep)
    if finished and not fresh:
        print(f"{path.stem}: finished, kept", flush=True)
        return read_stage(run / path.stem)[0]
    reason = "asked for again" if finished else reason
    hint = " (--keep keeps it)" if reason == "qs_lib changed" else ""
    print(f"{path.stem}: running, {reason}{hint}", flush=True)
    os.environ["QS_NOTEBOOK_SHA256"] = source
    try:
        execute(path, run / path.stem, {name: values[name] for name in given}, debug)
    except StageError as error:
        raise StageError(f"{path.stem}: {error}") from error
    record, reason = read_stage(run / path.stem)
    if record is None:
        raise StageError(f"{path.stem}: the notebook ended but its stage did not ({reason})")
    print(f"{path.stem}: done in {record['wall_s']:.0f} s{_summary(record['summary'])}", flush=True)
    return record


def _summary(summary: dict) -> str:
    plain = {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}
    words = [f"{name} {_number(value)}" for name, value in list(plain.items())[:4]]
    return ": " + ", ".join(words) if words else ""


def _number(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_scoreboard(path: Path) -> None:
    """Print ``scoreboard.json`` as a table. Raises StageError if it cannot be read."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        table = [("id", "criterion", "target", "value [95 % interval]", "reached")]
        for row in rows:
            value = "not measured"
            if row["value"] is not None:
                value = f"{_number(row['value'])} {row.get('unit') or ''}".strip()
                if row.get("low") is not None:
                    value += f" [{_number(row['low'])}, {_number(row['high'])}]"
            reached = {True: "yes", False: "no"}.get(row["reached"], "-")
            table.append((str(row["id"]), str(row["criterion"]), str(row["target"]), value, reached))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path} is not a scoreboard ({error!r}); make it with notebook 08_scoreboard") from None
    widths = [max(len(line[column]) for line in table) for column in range(5)]
    for number, line in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    print(f"reached: {sum(line[4] == 'yes' for line in table)} of {len(table) - 1}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qs_lib.workbook.run", description="Run notebooks 01 to 08 as one chain."
    )
    parser.add_argument(
        "--variant", default="pocket", help="params/<stage>/VARIANT.yaml; 'defaults' is the small CI run"
    )
    parser.add_argument("--run", metavar="NAME", help="outputs/NAME; default: VARIANT-run")
    parser.add_argument("--data", metavar="DIR", help="folder or file of problems, for notebooks that take data")
    parser.add_argument("--champion", metavar="MODEL", help="folder or Hugging Face name of the model to start from")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="parameters in place of the variant's, in every notebook that has them; 05_rl.steps=4 in that one alone",
    )
    parser.add_argument("--seed", type=int, help="seed of every stage")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages, as 05_rl or 05")
    parser.add_argument("--fresh", action="store_true", help="repeat finished stages too")
    parser.add_argument("--keep", action="store_true", help="keep finished stages although qs_lib changed")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and what notebooks print")
    parser.add_argument("--notebooks", type=Path, metavar="DIR", help="another folder of notebooks")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    os.environ["QS_COMMAND"] = "python -m qs_lib.workbook.run " + shlex.join(words)
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    if options.debug:
        os.environ["QS_DEBUG"] = "1"
    try:
        notebooks = options.notebooks and options.notebooks.resolve()
        run_name = options.run or f"{options.variant}-run"
        run = run_stages(
            options.variant,
            run_name,
            notebooks,
            options.data,
            options.seed,
            options.only,
            options.fresh,
            options.keep,
            options.debug,
            options.champion,
            options.set,
        )
        board = run / "08_scoreboard" / "scoreboard.json"
        if board.is_file():
            print_scoreboard(board)
    except WorkbookError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        print("\nstopped; the same command continues with the unfinished stage", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else error.code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a stopped papermill thread must not hold the process
