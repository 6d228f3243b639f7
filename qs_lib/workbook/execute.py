"""One notebook through papermill: its own kernel, progress bars in the terminal, a clean end however it ends."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

from .. import errors
from ..errors import StageError
from ..viewing.escape import safe_line

# tqdm.auto draws a widget in a kernel, which a terminal cannot show: text bars there, passed on by Terminal
TEXT_BARS = "import tqdm.auto as _a, tqdm.std as _s; _a.tqdm, _a.trange = _s.tqdm, _s.trange; del _a, _s"


class Terminal:
    """Write a notebook's text, which cannot steer the terminal. A log file gets the last state of progress bars."""

    def __init__(self, stream):
        self.stream = stream
        self.live = stream.isatty()
        self.line = ""

    def write(self, text: str) -> None:
        text = safe_line(text)
        if self.live:
            self.stream.write(text.replace("\r", "\r\x1b[K"))  # two bars of different length share the line
            return
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.stream.write(line.rsplit("\r", 1)[-1] + "\n")

    def flush(self) -> None:
        self.stream.flush()


def execute(notebook: Path, folder: Path, parameters: dict, debug: bool = False) -> None:
    """Execute one notebook into ``folder`` with this Python as its kernel, in the notebook's own folder.

    Papermill works in a thread, so that signals reach us: its own handlers end the kernel and hide the reason. Off the
    main thread (a worker of a cluster) no signal is caught, and the kernel ends with this process all the same.
    Raises ``StageError`` with the message of the failed cell, ``KeyboardInterrupt`` or ``SystemExit(143)`` if stopped.
    """
    import papermill

    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{notebook.name}"  # papermill writes in place
    final = folder / notebook.name
    terminal, kernel, failures = Terminal(sys.stderr), _kernel_class(), []
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, aside)]  # papermill formats them
    settings = {"parameters": parameters, "kernel_name": "python3", "language": "python", "cwd": str(notebook.parent)}
    settings |= {"kernel_manager_class": kernel, "start_timeout": 300}  # a busy machine may take minutes to start one
    settings |= {"progress_bar": {"desc": notebook.stem, "file": terminal, "leave": False, "ncols": 80}}
    settings |= {"stdout_file": Terminal(sys.stdout) if debug else None, "stderr_file": terminal}
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what went wrong is said below, once

    def work():
        try:
            papermill.execute_notebook(*paths, **settings)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (told by the main thread)
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    try:
        with _signals_caught() as caught:
            thread.start()
            while thread.is_alive() and not caught:
                thread.join(0.2)
            if caught:
                _stop(thread, kernel, caught)
    finally:
        if aside.is_file():
            os.replace(aside, final)
    if caught:
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(143)
    if failures:
        raise _failure(failures[0], final) from failures[0]


def _kernel_class() -> type:
    """Return a kernel manager of this Python, which keeps the one that papermill makes as ``started``."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_core.paths import jupyter_runtime_dir

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
    argv += [f"--IPKernelApp.exec_lines={TEXT_BARS}"]

    class Kernel(AsyncKernelManager):
        started = None
        # sockets in the user's own folder instead of open ports; their path may have 107 letters
        transport = "ipc" if len(jupyter_runtime_dir()) < 55 else "tcp"
        kernel_spec = KernelSpec(argv=argv, language="python", env=_waiting())

        def __init__(self, **options):
            super().__init__(**options)
            # else the sockets are "kernel-ipc-1" in the working directory, and two runs read each other's messages
            Path(jupyter_runtime_dir()).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.connection_file = str(Path(jupyter_runtime_dir()) / f"kernel-{uuid.uuid4()}.json")
            Kernel.started = self

        def signal(self, number):
            process = self.provisioner and self.provisioner.process
            if process and process.poll() is None:
                process.send_signal(number)

    return Kernel


def _waiting() -> dict[str, str]:
    """Return how often a kernel's threads spin before they sleep: more often where the cores are idle now.

    A step of the pocket champion then takes a third less. Beside a busy program it would take half as much again.
    """
    import psutil

    if os.environ["GOMP_SPINCOUNT"] != "1000" or os.environ.get("OMP_NUM_THREADS") == "1":  # the user's, or no waiting
        return {}
    neighbours = psutil.cpu_percent(0.3) / 100 * psutil.cpu_count()  # cores that other programs use
    return {"GOMP_SPINCOUNT": "6000"} if neighbours < 0.5 else {}


@contextlib.contextmanager
def _signals_caught():
    """Yield the list of SIGINT and SIGTERM that arrive. Off the main thread it stays empty."""
    caught, last = [], float("-inf")

    def note(number, frame):
        nonlocal last
        if time.monotonic() - last > 0.5:  # `timeout` sends every signal twice
            caught.append(number)
            last = time.monotonic()

    on_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if on_main}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop(thread: threading.Thread, kernel: type, caught: list) -> None:
    """Let the running cell save and leave within five seconds. A second signal ends it at once."""
    if kernel.started:
        kernel.started.signal(signal.SIGINT)
    end = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < end and len(caught) == 1:
        thread.join(0.1)
    if kernel.started:
        kernel.started.signal(signal.SIGKILL)
    thread.join(1)


def _failure(error: BaseException, notebook: Path) -> StageError:
    """Return what to tell about a notebook that did not run to its end."""
    message = str(error)
    if type(error).__name__ == "DeadKernelError":
        return StageError("the kernel died, most often for lack of memory; run the same command again to continue")
    if hasattr(error, "evalue"):
        message = error.evalue if hasattr(errors, error.ename) else f"{error.ename}: {error.evalue}"
        if error.ename in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in message:
            again = "lower batch_size or num_thoughts and run the same command again to continue"
            message = f"there is not enough memory; {again}"
    return StageError(f"{safe_line(message.strip())}\n  the executed notebook is {shown_path(notebook)}")


def shown_path(path: Path) -> str:
    """Return a path as the user would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
