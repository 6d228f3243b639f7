"""Files that are there whole or not at all, where runs lie, and the lock on a run folder."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from .errors import StageError, UpstreamError

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else Path.cwd()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yield a path to write a file or folder at, which then takes the place of ``path``, whole or not at all.

    What was written survives a power cut. Raises ``StageError`` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    discard(temporary)
    try:
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:
            _sync(written)
        if path.is_dir() or temporary.is_dir():  # a file is replaced in one step, a folder cannot be
            discard(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        discard(temporary)
        if isinstance(error, OSError) or "os error" in str(error):  # safetensors raises its own kind
            raise write_error(error, path) from None
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises ``StageError`` if it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def discard(path: Path) -> None:
    """Remove a file or folder if there is one and it can be removed."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError:
        pass  # the read-only folder or dead disk that brought us here


def write_error(error: Exception, path: Path) -> StageError:
    """Return the sentence for a failed write."""
    number, text = getattr(error, "errno", None), str(error)  # safetensors gives the number in its text only
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(r"os error (28|122|27)\b", text):
        return StageError(f"no space left to write {path}; free some space and run the same command again")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or re.search(r"os error (13|1|30)\b", text):
        return StageError(f"{path} cannot be written; set QS_OUTPUTS to a folder that you may write to")
    return StageError(f"{path} cannot be written: {getattr(error, 'strerror', None) or text}")


def to_json(value, indent: int | None = None) -> str:
    """Return JSON text, numbers for scalar tensors. Raises ``StageError`` for NaN, infinity and other objects."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent, default=_as_number)
    except ValueError:
        raise StageError(f"NaN or infinity cannot be recorded: {repr(value)[:200]}") from None
    except TypeError:
        raise StageError(f"only plain values can be recorded, not {repr(value)[:200]}") from None


def _as_number(value):
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError) as error:
        raise TypeError from error


def save_whole(path: Path, *parts) -> None:
    """Save a model and its tokenizer into one folder, whole or not at all."""
    with atomic_write(path) as temporary:
        for part in parts:
            part.save_pretrained(temporary)


def lock_run(folder: Path, user: str, name: str = ".lock", wait: float = 0.0) -> AcquireReturnProxy:
    """Lock a run folder till the process or a ``with`` ends. Raises ``StageError`` with its holder after ``wait`` s."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name, is_singleton=True)  # the same process may start its stage again
        held = lock.acquire(timeout=wait)
    except Timeout:
        try:
            holder = (folder / f"{name}.holder").read_text(encoding="utf-8")
        except OSError:
            holder = "another process"
        raise StageError(f"run {folder.name} is in use by {holder}; wait, stop it, or choose another name") from None
    except OSError as error:
        raise write_error(error, folder) from None
    write_bytes(folder / f"{name}.holder", f"process {os.getpid()} on {socket.gethostname()} ({user})".encode())
    return held


def json_or_text(text: str):
    """Return the JSON value that ``text`` spells, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_rows(path: Path) -> list[dict]:
    """Return the rows of an experiment's CSV, numbers and lists as such, none where there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: json_or_text(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write the rows as CSV, a cell as text or JSON. Columns are those of all rows, in order of appearance."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    table.writeheader()
    plain = lambda v: v and isinstance(v, str) and json_or_text(v) == v  # what is read back as it is
    table.writerows({k: v if plain(v) else to_json(v) for k, v in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.getvalue().encode())


def outputs_root() -> Path:
    """Return where runs go, ``QS_OUTPUTS`` or ``outputs``: in the repository, never in a notebook's working directory."""
    return (REPOSITORY / os.path.expanduser(os.environ.get("QS_OUTPUTS") or "outputs")).resolve()


def run_folder(run_name: str) -> Path:
    """Return ``outputs/<run_name>``. Raises ``StageError`` if it would lie elsewhere."""
    if not re.fullmatch(RUN_NAME, run_name):
        raise StageError(f"{run_name!r} cannot name a run: use letters, digits, '.', '_' or '-', at most 64")
    folder = outputs_root() / run_name
    if folder.resolve() != folder:
        raise StageError(f"{folder} is a link that leaves {folder.parent}; choose another run_name")
    return folder


def find_run(upstream: str) -> Path:
    """Return the run folder of a name, a path or "" (the committed pocket run). Raises ``UpstreamError``."""
    if not upstream:
        return REPOSITORY / "outputs" / "pocket"
    named = outputs_root() / upstream
    if re.fullmatch(RUN_NAME, upstream) and named.is_dir():
        return named
    path = REPOSITORY / os.path.expanduser(upstream)  # Path's own raises for an unknown user's home
    if path.is_dir():
        return path
    make = f"`make run RUN={upstream}`" if re.fullmatch(RUN_NAME, upstream) else "`make run`"
    raise UpstreamError(f"there is no run {upstream!r} in {outputs_root()}; make it with {make}")
