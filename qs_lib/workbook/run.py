"""Run the notebooks in order: ``python -m qs_lib.workbook.run --variant pocket``.

Each notebook is executed by papermill into ``outputs/<run>/<stage>/``. A stage is skipped only if its ``run.json``
still holds (see :mod:`qs_lib.workbook.stage`). Papermill's own "completed" is not believed.
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
from ..stats import as_text
from .execute import execute, shown_path
from .params import check_parameters, notebook_parameters, read_variant
from .scoreboard import outcome, value_text
from .stage import CODE_CHANGED, notebook_hash, read_stage, stage_finished

NOT_SETTABLE = {"run_name", "upstream"}  # parameters that the driver sets itself
RUN_OPTIONS = {  # of the command line
    "--variant": {"default": "pocket", "help": "params/<stage>/VARIANT.yaml; 'defaults' is the small CI run"},
    "--run": {"dest": "run_name", "metavar": "NAME", "help": "outputs/NAME; default: VARIANT-run"},
    "--data": {"metavar": "DIR", "help": "folder or file of problems, for notebooks that take data"},
    "--champion": {"metavar": "MODEL", "help": "folder or Hugging Face name of the model to start from"},
    "--set": {"dest": "words", "nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    | {"help": "parameters in place of the variant's, in every notebook with them; 05_rl.steps=4 in that one alone"},
    "--seed": {"type": int, "help": "seed of every stage"},
    "--only": {"nargs": "+", "metavar": "STAGE", "default": (), "help": "only these stages, as 05_rl or 05"},
    "--fresh": {"action": "store_true", "help": "repeat finished stages too"},
    "--keep": {"action": "store_true", "help": "keep finished stages although the code behind their numbers changed"},
    "--debug": {"action": "store_true", "help": "show tracebacks and what notebooks print"},
    "--notebooks": {"type": Path, "default": REPOSITORY / "notebooks", "metavar": "DIR", "help": "other notebooks"},
}


def stage_notebooks(folder: Path) -> list[Path]:
    """Return the chain, 01 to 08, in order. 00_start_here is a tour of it, and 09_scale is about machines."""
    return sorted(folder.glob("0[1-8]_*.ipynb"))


def given_parameters(notebook: Path, options: argparse.Namespace) -> dict:
    """Return what file and command line set in a notebook. Raises ``ParameterError`` for a bad file or ``data``."""
    given = read_variant(options.variant, notebook.parent.parent).get(notebook.stem, {})
    given |= {"run_name": options.run_name, "upstream": options.run_name}
    if options.seed is not None:
        given["seed"] = options.seed
    known = notebook_parameters(notebook)
    for name in ("data", "champion"):
        if name in known and (word := getattr(options, name)):
            path = Path(os.path.expanduser(word)).resolve()
            if name == "data" and not path.exists():
                raise ParameterError(f"there is no file or folder {path} to read data from")
            given[name] = str(path) if path.exists() else word
    return given


def named_stages(notebooks: list[Path], names) -> list[Path]:
    """Return the notebooks of these stages, each given as ``05_rl`` or ``05``. Raises ``ParameterError`` for others."""
    for name in names:
        if not any(name in (path.stem, path.stem[:2]) for path in notebooks):
            raise ParameterError(unknown_name(name, [path.stem for path in notebooks]).replace("parameter", "stage", 1))
    return [path for path in notebooks if path.stem in names or path.stem[:2] in names]


def overrides(notebooks: list[Path], words) -> dict[Path, dict]:
    """Return for each notebook what ``words`` set in it.

    ``steps=4`` is set wherever there is such a parameter, ``05_rl.steps=4`` in that notebook alone, and wins. Values
    are read as YAML. Raises ``ParameterError`` for another form, stage or name.
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
        chosen = named_stages(notebooks, [stage]) if stage else notebooks
        known = {path: notebook_parameters(path).keys() - NOT_SETTABLE for path in chosen}
        if not any(name in names for names in known.values()):
            raise ParameterError(unknown_name(name, set().union(*known.values())))
        for path in (path for path in known if name in known[path]):
            found[path][name] = value
    return found


def run_stages(options: argparse.Namespace) -> Path:
    """Execute the unfinished stages of a run in order and return its folder. Raises ``WorkbookError``."""
    if not (chosen := stage_notebooks(options.notebooks)):
        raise StageError(f"there are no notebooks in {options.notebooks}")
    chosen = named_stages(chosen, options.only) if options.only else chosen
    changed = overrides(chosen, options.words)
    given = {path: given_parameters(path, options) | changed[path] for path in chosen}
    for path in chosen:  # all, before the first minute is spent
        check_parameters(path, given[path])

    run = run_folder(options.run_name)
    with lock_run(run, "make run", ".driver.lock"):
        print(f"run {options.run_name}: {len(chosen)} stages into {shown_path(run)}", flush=True)
        for path in chosen:
            run_stage(path, run, given[path], options.fresh, options.keep, options.debug)
    return run


def run_stage(path: Path, run: Path, given: dict, fresh=False, keep=False, debug=False) -> dict:
    """Execute one notebook into ``run`` unless its stage there is finished, and return the stage's record.

    ``given``: what differs from the notebook's defaults. Raises ``StageError``, and ``ParameterError`` for bad values.
    """
    source, values = notebook_hash(path), check_parameters(path, given)
    upstream = find_run(values["upstream"])
    finished, reason = stage_finished(run / path.stem, values, source, upstream, check_code=not keep)
    if finished and not fresh:
        print(f"{path.stem}: finished, kept", flush=True)
        return read_stage(run / path.stem)[0]
    reason = "asked for again" if finished else reason
    hint = " (--keep keeps it)" if reason == CODE_CHANGED else ""
    print(f"{path.stem}: running, {reason}{hint}", flush=True)
    os.environ["QS_NOTEBOOK_SHA256"] = source
    try:
        execute(path, run / path.stem, {name: values[name] for name in given}, debug)
    except StageError as error:
        raise StageError(f"{path.stem}: {error}") from error
    record, reason = read_stage(run / path.stem)
    if record is None:
        raise StageError(f"{path.stem}: the notebook ended but its stage did not ({reason})")
    told = [f"{name} {as_text(x)}" for name, x in record["summary"].items() if isinstance(x, (int, float, str))]
    words = ", ".join(told[:4])
    print(f"{path.stem}: done in {record['wall_s']:.0f} s{words and ': '}{words}", flush=True)
    return record


def print_scoreboard(path: Path) -> None:
    """Print ``scoreboard.json`` as a table. Raises ``StageError`` if it cannot be read."""
    table = [("id", "criterion", "target", "value [95 % interval]", "outcome")]
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        table += [[str(row["id"]), row["criterion"], row["target"], value_text(row), outcome(row)] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path} is not a scoreboard ({error!r}); make it with notebook 08_scoreboard") from None
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"reached: {sum(row['reached'] is True for row in rows)} of {len(rows)}")


def exit_code(work, stopped: str, debug: bool = False) -> int:
    """Return ``work()``'s exit code, 1 after a ``WorkbookError``, or a signal's, told with the words ``stopped``."""
    try:
        return work()
    except WorkbookError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else error.code


def parsed(program: str, about: str, options: dict[str, dict], arguments: list[str] | None) -> argparse.Namespace:
    """Return what a command line says, with the line itself as ``command``; ``options`` are argparse's own."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    for option, settings in options.items():
        parser.add_argument(option, **settings)
    given = parser.parse_args(arguments)
    given.command = f"{program} {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    return given


def run_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a run, by default those of the command line."""
    given = parsed("python -m qs_lib.workbook.run", "Run notebooks 01 to 08 as one chain.", RUN_OPTIONS, arguments)
    given.run_name = given.run_name or f"{given.variant}-run"
    given.notebooks = given.notebooks.resolve()
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = run_options(arguments)
    os.environ["QS_COMMAND"] = given.command
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    if given.debug:
        os.environ["QS_DEBUG"] = "1"

    def work():
        board = run_stages(given) / "08_scoreboard" / "scoreboard.json"
        if board.is_file() and (not given.only or any(name.startswith("08") for name in given.only)):  # else of before
            print_scoreboard(board)
        return 0

    return exit_code(work, "the same command continues with the unfinished stage", given.debug)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a stopped papermill thread must not hold the process
