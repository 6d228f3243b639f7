"""Servers to look at, and a watch on what a page does."""

import socket
import subprocess
import sys
import time
import urllib.request

import pytest

IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url: str, process, seconds: float = 90) -> None:
    """Until a server answers. Fails with its last words when it dies or does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    process.kill()
    pytest.fail(f"no server at {url}: {process.stdout.read()[-2000:] if process.stdout else ''}")


def serve(command: list[str], url: str, environment, cwd):
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=cwd,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(url, process)
    yield url
    process.terminate()
    process.wait(20)


class Watch:
    """What a page must not do: open dialogs, ask other hosts, raise errors."""

    def __init__(self, page):
        self.dialogs, self.requests, self.errors = [], [], []
        page.on("dialog", lambda d: (self.dialogs.append(d.message), d.dismiss()))
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: self.requests.append(r.url) if not self._ours(r.url) else None)

    @staticmethod
    def _ours(url: str) -> bool:
        return url.startswith(
            ("http://127.0.0.1:", "ws://127.0.0.1:", "data:image", "data:font", "data:application", "blob:", "file:")
        )
