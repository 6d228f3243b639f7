"""Files that are there whole or not at all, and the lock on a run folder."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from .params import WorkbookError


class StageError(WorkbookError):
    """A run folder cannot be used or written."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises StageError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        discard(temporary)
        raise write_error(error, path) from None


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or folder if there is one and it can be removed."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError:
        pass  # the read-only folder or dead disk that brought us here


def write_error(error: Exception, path: Path) -> StageError:
    """The sentence for a failed write."""
    number, text = getattr(error, "errno", None), str(error)  # safetensors gives the number in its text only
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(r"os error (28|122|27)\b", text):
        return StageError(f"no space left to write {path}; free some space and run the same command again")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or re.search(r"os error (13|1|30)\b", text):
        return StageError(f"{path} cannot be written; set QS_OUTPUTS to a folder that you may write to")
    return StageError(f"{path} cannot be written: {getattr(error, 'strerror', None) or text}")


def to_json(value, indent: int | None = None) -> str:
    """JSON text; one-element tensors and numpy scalars become numbers.

    Raises StageError for NaN, infinity and other objects.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent, default=_number)
    except ValueError:
        raise StageError(f"NaN or infinity cannot be recorded: {repr(value)[:200]}") from None
    except TypeError:
        raise StageError(f"only plain values can be recorded, not {repr(value)[:200]}") from None


def _number(value):
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError) as error:
        raise TypeError from error


def lock_run(folder: Path, user: str, name: str = ".lock") -> FileLock:
    """The operating system's lock on a run folder; it ends with the process, however that ends.

    Raises StageError, which names the holder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name, is_singleton=True)  # the same process may start its stage again
        lock.acquire(blocking=False)
    except Timeout:
        try:
            holder = (folder / f"{name}.holder").read_text(encoding="utf-8")
        except OSError:
            holder = "another process"
        raise StageError(
            f"run {folder.name} is in use by {holder}; wait, stop it, or choose another name"
        ) from None
    except OSError as error:
        raise write_error(error, folder) from None
    write_bytes(
        folder / f"{name}.holder", f"process {os.getpid()} on {socket.gethostname()} ({user})".encode()
    )
    return lock
