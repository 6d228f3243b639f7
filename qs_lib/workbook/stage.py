"""One stage of a run: its folder, what it read from earlier stages and what it wrote.

``outputs/<run_name>/<stage>/`` belongs to the notebook of that name. ``run.json`` is written last, with the SHA-256 of
every output and of what was read: only a stage whose ``run.json`` still holds counts as finished. Names that start
with a dot (locks, checkpoints, half-written files) are not outputs.
"""

import hashlib
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from .. import files
from ..errors import StageError, UpstreamError
from ..files import PACKAGE, REPOSITORY, atomic_write, discard, find_run, run_folder, sha256, to_json, write_error
from .params import NotebookParams

FORMAT_VERSION = 1
CHECKPOINTS = ".checkpoint"
CODE_CHANGED = "the code behind its numbers changed"
# wings and files of the library that numbers depend on; see code_hash
SCIENCE = set("errors stats files settings thoughts data mixing model champion evaluation training".split())
PACKAGES = {"qs_lib": "quiet-star-workbook", "torch": "torch", "transformers": "transformers", "datasets": "datasets"}


def read_stage(folder: Path) -> tuple[dict | None, str]:
    """Return the record of a finished stage and "", or None and the reason why it does not count as finished."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        version, outputs = record["format_version"], record["outputs"]
    except FileNotFoundError:
        return None, "not finished" if folder.is_dir() else "not run yet"
    except (OSError, ValueError, KeyError, TypeError):
        return None, "run.json cannot be read"
    if version != FORMAT_VERSION:
        return None, f"run.json has format {version}, this version reads {FORMAT_VERSION}"
    for name, entry in outputs.items():
        if not (path := folder / name).is_file():
            return None, f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            return None, f"{name} has changed since it was written"
    return record, ""


def stage_digest(record: dict) -> str:
    """Return one hash over all that a later stage can read from this one."""
    return hashlib.sha256(json.dumps([record["outputs"], record["summary"]], sort_keys=True).encode()).hexdigest()


def stage_finished(
    folder: Path, parameters: dict, notebook: str, upstream: Path | None = None, check_code: bool = True
) -> tuple[bool, str]:
    """Return whether a stage need not run again, and the reason if it must. ``notebook``: its :func:`notebook_hash`.

    ``parameters``: all of them, defaults included. ``upstream``: the run folder it reads from.
    """
    record, reason = read_stage(folder)
    if record is None:
        return False, reason
    for name in sorted(set(parameters) | set(record["parameters"])):
        old, new = record["parameters"].get(name), parameters.get(name)
        if old != new:
            return False, f"parameter {name} changed ({old!r} -> {new!r})"
    if record.get("data_sha256") not in (None, data_hash(parameters)):  # records had none before
        return False, "the files of data changed"
    if record["notebook_sha256"] != notebook:
        return False, "the notebook changed"
    if check_code and record["code_sha256"] != code_hash():
        return False, CODE_CHANGED
    for name, digest in record["upstream"]["stages"].items():
        earlier, reason = read_stage(upstream / name) if upstream else (None, "not found")
        if earlier is None:
            return False, f"{name}: {reason}"
        if stage_digest(earlier) != digest:
            return False, f"{name} changed"
    return True, "finished"


class Stage:
    """A stage that :func:`start_stage` began."""

    def __init__(self, params: NotebookParams, name: str):
        self.params = params
        self.name = name
        self.run = run_folder(params.run_name)
        self.folder = self.run / name
        self.upstream_stages = {}
        self._started = time.monotonic()
        self._lock = None

    def __repr__(self):
        return f"Stage({self.name} of run {self.params.run_name})"

    def need(self, stage: str) -> Path:
        """Return an earlier stage's folder, checked, its hash recorded. Raises ``UpstreamError`` with the command."""
        run = find_run(self.params.upstream)
        record, reason = read_stage(run / stage)
        if record is None:
            make = "`git checkout outputs/pocket` or `make refresh`"
            if self.params.upstream:
                alone = f"notebooks/{stage}.ipynb outputs/{run.name}-{stage}.ipynb -p run_name {run.name}"
                make = f"`papermill {alone}` or all stages with `make run RUN={run.name}`"
            raise UpstreamError(f"{self.name} needs {stage} of the run {run.name} ({reason}); make it with {make}")
        self.upstream_stages[stage] = stage_digest(record)
        return run / stage

    def path(self, name: str) -> Path:
        """Return where the stage's file or folder ``name`` is, its parent folder made. Raises ``StageError``."""
        path = self.folder / name
        if ".." in path.parts or self.folder not in path.parents:
            raise StageError(f"{name!r} is not inside the stage's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, **metrics) -> None:
        """Append one line to ``metrics.jsonl``. Raises ``StageError``, also for NaN and infinity."""
        line = to_json(metrics) + "\n"
        path = self.path("metrics.jsonl")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise write_error(error, path) from None

    def write_json(self, name: str, value) -> None:
        """Write ``value`` as JSON. Raises ``StageError``."""
        files.write_bytes(self.path(name), f"{to_json(value, indent=1)}\n".encode())

    def write_jsonl(self, name: str, rows) -> None:
        """Write one JSON line a row. Raises ``StageError``."""
        files.write_bytes(self.path(name), "".join(f"{to_json(row)}\n" for row in rows).encode())

    def save_model(self, name: str, model, tokenizer=None) -> Path:
        """Save the model and its tokenizer into the folder ``name``. Raises ``StageError``."""
        path = self.path(name)
        files.save_whole(path, *(part for part in (model, tokenizer) if part is not None))
        return path

    def copy(self, name: str, copied: str) -> Path:
        """Copy a file or folder of this stage inside it, in place of what is there. Raises ``StageError``."""
        return _copied(self.path(name), self.path(copied))

    def publish(self, name: str) -> Path:
        """Copy a finished file or folder of this stage to the run folder itself. Raises ``StageError``."""
        return _copied(self.path(name), self.run / Path(name).name)

    def identity(self) -> dict:
        """Return what a checkpoint inside this stage must agree on to be resumed: parameters, upstream and code."""
        given, earlier = self.params.model_dump(mode="json"), self.upstream_stages
        return {"parameters": given, "upstream": earlier, "code": code_hash(), "data": data_hash(given)}

    def finish(self, summary: dict) -> dict:
        """Write ``run.json``, last, and return ``summary``: the stage counts as finished, and its checkpoints go.

        Raises ``StageError`` if the summary holds anything but plain finite values, or the disk is full.
        """
        outputs = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".ipynb"):
            name = path.relative_to(self.folder).as_posix()
            if name != "run.json" and not name.startswith(".") and "/." not in name:
                outputs[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        upstream = find_run(self.params.upstream).name if self.upstream_stages else None
        notebook, parameters = REPOSITORY / "notebooks" / f"{self.name}.ipynb", self.params.model_dump(mode="json")
        by_hand = f"papermill notebooks/{notebook.name} outputs/{self.params.run_name}-{notebook.name} -y "
        command = os.environ.get("QS_COMMAND") or by_hand + shlex.quote(self.params.model_dump_json())
        on_disk = notebook_hash(notebook) if notebook.is_file() else None
        record = {"format_version": FORMAT_VERSION, "stage": self.name, "command": command, "parameters": parameters}
        record |= {"seed": self.params.seed, "summary": summary, "wall_s": round(time.monotonic() - self._started, 1)}
        record |= {"upstream": {"run": upstream, "stages": self.upstream_stages}, "outputs": outputs}
        record |= {"versions": versions(), "git_commit": git_commit(), "code_sha256": code_hash()}
        record |= {"data_sha256": data_hash(parameters)}
        record |= {"notebook_sha256": os.environ.get("QS_NOTEBOOK_SHA256") or on_disk, **machine()}
        self.write_json("run.json", record)
        discard(self.folder / CHECKPOINTS)
        self._lock.lock.release(force=True)
        return summary


def _copied(source: Path, target: Path) -> Path:
    with atomic_write(target) as temporary:
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, temporary)
    return target


def start_stage(params: NotebookParams, stage: str, needs: tuple[str, ...] = ()) -> Stage:
    """Begin the stage ``stage`` (the notebook's name) of the run ``params.run_name``.

    ``needs`` names the earlier stages it reads, each checked before anything is touched. Then the run folder is locked
    and what an earlier attempt left in the stage's folder is removed, ``run.json`` first. Hidden files and notebooks
    stay. Raises ``UpstreamError`` if an earlier stage is not finished, ``StageError`` if the folder cannot be used.
    """
    started = Stage(params, stage)
    for name in needs:
        started.need(name)
    started._lock = files.lock_run(started.run, f"stage {stage}")
    try:
        started.folder.mkdir(exist_ok=True)
        (started.folder / "run.json").unlink(missing_ok=True)
        for path in list(started.folder.iterdir()):
            unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
            if unfinished or not (path.name.startswith(".") or path.suffix == ".ipynb"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise write_error(error, started.folder) from None
    return started


def code_hash() -> str:
    """Return one hash over the source that a stage's numbers depend on: the wings and files of ``SCIENCE``.

    Viewing, the workbook and the experiments are left out: a colour in a figure must not repeat a training, and
    settings are compared by themselves (:func:`stage_finished`, :meth:`Stage.identity`). What the workbook computes of
    its own, such as the criteria of the scoreboard, is renewed by ``make run NB=08_scoreboard FRESH=1``.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0].removesuffix(".py") in SCIENCE:
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def notebook_hash(notebook: Path) -> str:
    """Return one hash over a notebook's code cells. Text and outputs may change without a rerun."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def data_hash(parameters: dict) -> str | None:
    """Return one hash over the files that ``data`` names, None where it names none: edited data is other data."""
    named = Path(os.path.expanduser(parameters.get("data") or os.devnull))
    found = sorted(path for path in (named, *named.glob("*")) if path.suffix in (".jsonl", ".csv") and path.is_file())
    return hashlib.sha256("".join(map(sha256, found)).encode()).hexdigest() if found else None


def versions() -> dict:
    """Return the versions of Python and of the packages that numbers depend on, None for one that is missing."""
    installed = {key: next(iter(metadata.distributions(name=name)), None) for key, name in PACKAGES.items()}
    return {"python": platform.python_version()} | {key: one and one.version for key, one in installed.items()}


def git_commit() -> str | None:
    """Return HEAD, with "-dirty" where code, notebooks or parameters differ from it, None outside git."""

    def git(*words):
        return subprocess.run(["git", "-C", PACKAGE.parent, *words], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("-dirty" if git("status", "--porcelain", "--", "qs_lib", "notebooks", "params") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict:
    """Return the kind of device, its threads and platform, and the MB needed at most, without the machine's name."""
    torch = sys.modules.get("torch")  # a stage that did not import it did not use it
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    resident = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    found = {"device": "cpu", "device_name": platform.machine(), "threads": torch and torch.get_num_threads()}
    found |= {"platform": f"{platform.system()} {platform.machine()}", "peak_memory_mb": resident}
    if torch and torch.cuda.is_available():
        found |= {"device": "cuda", "device_name": torch.cuda.get_device_name()}
        found |= {"peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6)}
    return found
