"""Run the notebooks in order: ``python -m qs_lib.run --variant pocket``.

Each notebook is executed by papermill into ``outputs/<run>/<stage>/``. A stage is skipped only if its
``run.json`` still holds (see :mod:`qs_lib.stage`); papermill's own "completed" is not believed.
"""

import argparse
import asyncio
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import yaml

from .files import StageError, lock_run
from .params import ParameterError, WorkbookError, check_parameters, notebook_parameters, unknown_name
from .stage import (
    REPOSITORY,
    find_run,
    notebook_hash,
    read_stage,
    run_folder,
    stage_finished,
    start_stage,
)

__all__ = ["execute", "given_parameters", "main", "print_scoreboard", "run_stages", "start_stage"]

# tqdm.auto draws a widget in a kernel, which a terminal cannot show: text bars there, passed on by _Terminal
TEXT_BARS = "import tqdm.auto as _a, tqdm.std as _s; _a.tqdm, _a.trange = _s.tqdm, _s.trange; del _a, _s"


class _Terminal:
    """Where notebooks' progress bars go: redrawn in place on a terminal, their last state only in a log file."""

    def __init__(self, stream):
        self.stream = stream
        self.live = stream.isatty()
        self.line = ""

    def write(self, text: str) -> None:
        if self.live:
            self.stream.write(text.replace("\r", "\r\x1b[K"))  # two bars of different length share the line
            return
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.stream.write(line.rsplit("\r", 1)[-1] + "\n")

    def flush(self) -> None:
        self.stream.flush()


def stage_notebooks(folder: Path) -> list[Path]:
    """The notebooks that make stages, in order; 00_start_here makes none."""
    return [path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if not path.name.startswith("00_")]


def given_parameters(notebook: Path, variant: str, run_name: str, data: str | None, seed: int | None) -> dict:
    """What this run sets: ``params/<stage>/<variant>.yaml`` and the command line's; not checked yet.

    Raises ParameterError if the file is not a flat YAML mapping or there is nothing at ``data``.
    """
    path = notebook.parent.parent / "params" / notebook.stem / f"{variant}.yaml"
    given = {}
    if path.is_file():
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ParameterError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict):
            raise ParameterError(f"{path} must hold lines of the form 'name: value'")
    given |= {"run_name": run_name, "upstream": run_name}
    if seed is not None:
        given["seed"] = seed
    if data and "data" in notebook_parameters(notebook):
        path = Path(data).expanduser().resolve()
        if not path.exists():
            raise ParameterError(f"there is no file or folder {path} to read data from")
        given["data"] = str(path)
    return given


def check_variant(variant: str, folder: Path) -> None:
    """Raises ParameterError if no notebook has a parameter file of this name."""
    known = {path.stem for path in (folder.parent / "params").glob("*/*.yaml")} | {"defaults"}
    if variant not in known:
        raise ParameterError(unknown_name(variant, known).replace("parameter", "variant", 1))


def execute(notebook: Path, folder: Path, parameters: dict, debug: bool = False) -> None:
    """Execute one notebook into ``folder`` with this Python as its kernel, in the notebook's own folder.

    Raises StageError with the message of the failed cell; KeyboardInterrupt or SystemExit(143) when stopped.
    """
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_core.paths import jupyter_runtime_dir
    from nbclient.exceptions import DeadKernelError

    class Kernel(AsyncKernelManager):
        started = None
        # sockets in the user's own folder instead of open ports; their path may have 107 letters
        transport = "ipc" if os.name == "posix" and len(jupyter_runtime_dir()) < 55 else "tcp"
        kernel_spec = KernelSpec(
            argv=[
                *(sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"),
                f"--IPKernelApp.exec_lines={TEXT_BARS}",
            ],
            language="python",
        )

        def __init__(self, **options):
            super().__init__(**options)
            Kernel.started = self

        def signal(self, number):
            process = self.provisioner and self.provisioner.process
            if process and process.poll() is None:
                process.send_signal(number)

    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{notebook.name}"  # papermill writes in place
    final = folder / notebook.name
    terminal = _Terminal(sys.stderr)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what went wrong is said below, once
    failures = []

    def work():
        try:
            papermill.execute_notebook(
                *(
                    str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, aside)
                ),  # it formats paths
                parameters=parameters,
                kernel_name="python3",
                language="python",
                cwd=str(notebook.parent),
                progress_bar={"desc": notebook.stem, "file": terminal, "leave": False, "ncols": 80},
                stdout_file=sys.stdout if debug else None,
                stderr_file=terminal,
                kernel_manager_class=Kernel,
                start_timeout=300,  # a busy machine may take minutes to start a kernel
            )
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (told by the main thread)
            failures.append(error)

    # papermill works in a thread, so that signals reach us; its own handlers end the kernel and hide the reason
    stopped = []

    def stop(number, frame):
        if not stopped or time.monotonic() - stopped[0][1] > 0.5:  # `timeout` sends every signal twice
            stopped.append((number, time.monotonic()))

    thread = threading.Thread(target=work, daemon=True)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive() and not stopped:
            thread.join(0.2)
        if stopped:
            _stop(thread, Kernel, stopped)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if aside.is_file():
            os.replace(aside, final)
    if stopped:
        raise KeyboardInterrupt if stopped[0][0] == signal.SIGINT else SystemExit(143)
    if failures:
        raise _failure(failures[0], final, DeadKernelError) from failures[0]


def _stop(thread: threading.Thread, kernel, stopped: list) -> None:
    """Let the running cell save and leave within five seconds; a second signal ends it at once."""
    if kernel.started:
        kernel.started.signal(signal.SIGINT)
    end = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < end and len(stopped) == 1:
        thread.join(0.1)
    if kernel.started:
        kernel.started.signal(signal.SIGKILL)
    thread.join(1)


def _failure(error: BaseException, notebook: Path, dead_kernel: type) -> StageError:
    """What to tell about a notebook that did not run to its end."""
    if isinstance(error, dead_kernel):
        return StageError(
            "the kernel died, most often for lack of memory; run the same command again to continue"
        )
    message = str(error)
    if hasattr(error, "evalue"):
        own = [kind.__name__ for kind in _subclasses(WorkbookError)]
        message = error.evalue if error.ename in own else f"{error.ename}: {error.evalue}"
    return StageError(f"{message.strip()}\n  the executed notebook is {_shown(notebook)}")


def _subclasses(kind: type) -> list[type]:
    return [kind, *(further for child in kind.__subclasses__() for further in _subclasses(child))]


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


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
) -> Path:
    """Execute every stage of a run that is not finished yet, in order; returns the run folder.

    ``only``: names of stages, or their numbers; ``fresh``: repeat finished ones; ``keep``: do not repeat them as
    ``qs_lib`` changed.

    Raises WorkbookError in one sentence.
    """
    notebooks = notebooks or REPOSITORY / "notebooks"
    chosen = stage_notebooks(notebooks)
    if not chosen:
        raise StageError(f"there are no notebooks in {notebooks}")
    check_variant(variant, notebooks)
    for name in only or []:
        if not any(path.stem == name or path.stem.split("_")[0] == name for path in chosen):
            raise ParameterError(
                unknown_name(name, [path.stem for path in chosen]).replace("parameter", "stage", 1)
            )
    chosen = [path for path in chosen if not only or path.stem in only or path.stem.split("_")[0] in only]
    given = {path: given_parameters(path, variant, run_name, data, seed) for path in chosen}
    values = {
        path: check_parameters(path, given[path]) for path in chosen
    }  # all, before the first minute is spent

    run = run_folder(run_name)
    lock = lock_run(run, "make run", ".driver.lock")
    try:
        print(f"run {run_name}: {len(chosen)} stages into {_shown(run)}", flush=True)
        for path in chosen:
            source = notebook_hash(path)
            upstream = find_run(values[path]["upstream"])
            finished, reason = stage_finished(
                run / path.stem, values[path], source, upstream, check_code=not keep
            )
            if finished and not fresh:
                print(f"{path.stem}: finished, kept", flush=True)
                continue
            reason = "asked for again" if finished else reason
            hint = " (--keep keeps it)" if reason == "qs_lib changed" else ""
            print(f"{path.stem}: running, {reason}{hint}", flush=True)
            os.environ["QS_NOTEBOOK_SHA256"] = source
            try:
                execute(path, run / path.stem, {name: values[path][name] for name in given[path]}, debug)
            except StageError as error:
                raise StageError(f"{path.stem}: {error}") from error
            record, reason = read_stage(run / path.stem)
            if record is None:
                raise StageError(f"{path.stem}: the notebook ended but its stage did not ({reason})")
            print(f"{path.stem}: done in {record['wall_s']:.0f} s{_summary(record['summary'])}", flush=True)
    finally:
        lock.release(force=True)
    return run


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
        raise StageError(
            f"{path} is not a scoreboard ({error!r}); make it with notebook 08_scoreboard"
        ) from None
    widths = [max(len(line[column]) for line in table) for column in range(5)]
    for number, line in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    print(f"reached: {sum(line[4] == 'yes' for line in table)} of {len(table) - 1}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qs_lib.run", description="Run notebooks 01 to 08 as one chain."
    )
    parser.add_argument(
        "--variant", default="pocket", help="params/<stage>/VARIANT.yaml; 'defaults' is the small CI run"
    )
    parser.add_argument("--run", metavar="NAME", help="outputs/NAME; default: VARIANT-run")
    parser.add_argument(
        "--data", metavar="DIR", help="folder or file of problems, for notebooks that take data"
    )
    parser.add_argument("--seed", type=int, help="seed of every stage")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages, as 05_rl or 05")
    parser.add_argument("--fresh", action="store_true", help="repeat finished stages too")
    parser.add_argument("--keep", action="store_true", help="keep finished stages although qs_lib changed")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and what notebooks print")
    parser.add_argument("--notebooks", type=Path, metavar="DIR", help="another folder of notebooks")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    os.environ["QS_COMMAND"] = "python -m qs_lib.run " + shlex.join(words)
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
