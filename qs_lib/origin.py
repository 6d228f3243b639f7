"""What a result was made with: the code, the notebook, the commit, the packages and the machine."""

import hashlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .files import PACKAGE


def code_hash() -> str:
    """One hash over the library's own source."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def notebook_hash(notebook: Path) -> str:
    """One hash over a notebook's code cells; text and outputs may change without a rerun."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def versions() -> dict:
    """Versions of Python and of the packages that numbers depend on; None for one that is missing."""
    names = {
        "qs_lib": "quiet-star-workbook",
        "torch": "torch",
        "transformers": "transformers",
        "datasets": "datasets",
    }
    found = {"python": platform.python_version()}
    for key, package in names.items():
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[key] = None
    return found


def git_commit() -> str | None:
    """HEAD, with "-dirty" where code, notebooks or parameters differ from it; None outside a git checkout."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", PACKAGE.parent, *words], capture_output=True, text=True, check=True
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + (
            "-dirty" if git("status", "--porcelain", "--", "qs_lib", "notebooks", "params") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict:
    """Kind of device, its threads and platform, and the memory that was needed; no machine's name."""
    torch = sys.modules.get("torch")  # a stage that did not import it did not use it
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "device": "cuda" if cuda else "cpu",
        "device_name": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads() if torch else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "peak_memory_mb": _peak_memory(torch if cuda else None),
    }


def _peak_memory(torch) -> int | None:
    """MB that this process held at most: a GPU's own count where there is one, else resident memory; None on Windows."""
    if torch is not None:
        return round(torch.cuda.max_memory_allocated() / 1e6)
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (1e6 if sys.platform == "darwin" else 1e3))  # bytes there, kilobytes elsewhere
