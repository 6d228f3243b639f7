"""Checkpoints inside a training: everything it needs to go on to the bit, in one safetensors file, without pickle."""

import hashlib
import json
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import StageError
from ..files import discard, write_bytes
from . import distributed

FORMAT = "qs-checkpoint-1"
KEPT = 2
SHARE = 0.01  # of a training's time that writing may take


class Checkpoint:
    """Save and restore a training. Use it as a context around the loop.

        with Checkpoint(folder, {"steps": steps, ...}) as checkpoint:
            parts = {"model": model, "optimizer": optimizer, "order": rng, "losses": losses}
            for step, bar in checkpoint.steps(parts, steps, "name of the bar"):
                ...

    ``parts``: name -> whatever has ``state_dict``, a ``random.Random``, a ``torch.Generator``, or a list or dict that
    is changed in place. The global generators of torch, numpy and Python are saved beside them. ``identity``: what must
    be equal for a saved state to be this training's (parameters, data, code). Thread count and torch version always
    belong to it, because they change the bits. ``folder`` None: nothing is saved. ``log(**metrics)`` gets the metrics,
    and on resuming first those that were logged before.

    A file is written every ``seconds``, less often where writing would take more than ``SHARE`` of the time, after the
    last step, and where Ctrl-C or SIGTERM arrives. Then the step is finished and saved, and ``KeyboardInterrupt`` or
    ``SystemExit`` raised. A second signal leaves at once. The newest file whose checksum holds is read, and ``KEPT``
    are kept. Whoever owns the folder removes it (``Stage.finish``). Writing raises ``StageError``, as for a full disk.
    Of several processes (``distributed``) the first writes and logs, and all must read the same folder.
    """

    def __init__(self, folder: str | Path | None = None, identity=None, log=lambda **metrics: None, seconds=20.0):
        self.folder = None if folder is None else Path(folder)
        several = [distributed.count()] if distributed.count() > 1 else []
        machine = [torch.get_num_threads(), str(torch.__version__), *several]
        self.identity = json.dumps([identity, *machine], sort_keys=True, default=str)
        self.seconds, self.rows, self._log = seconds, [], log
        self._signal, self._saved, self._cost = None, time.monotonic(), 0.0

    def log(self, **metrics) -> None:
        """Metrics of the current step, logged again when the training is resumed after it."""
        self.rows.append(metrics)
        if distributed.first():
            self._log(**metrics)

    def __enter__(self):
        self._handlers = {}
        if self.folder is not None and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop(self, number, frame):
        if self._signal is not None:
            self._leave()
        self._signal = number

    def _leave(self):
        raise SystemExit(143) if self._signal == signal.SIGTERM else KeyboardInterrupt

    def steps(self, parts: dict, count: int, name: str):
        """Yield each step (from 0) that is left of ``count``, with the bar, and save after it.

        ``parts`` must have the ``model``. Raises ``TrainingError`` if processes differ in weights before or after it.
        """
        distributed.check_equal(parts["model"], "before training")
        first = self.resume(parts)
        bar = distributed.bar(range(first, count), name, initial=first, total=count)
        for step in bar:
            yield step, bar
            self.after(step + 1, parts, last=step + 1 == count)
        distributed.check_equal(parts["model"], "after training")

    def resume(self, parts: dict) -> int:
        """Restore ``parts`` from the newest whole checkpoint of this training; returns the number of finished steps.

        Where there is none, what another training left is removed. Raises ``StageError`` if processes found two.
        """
        step = self._restored(parts)
        if distributed.either(step != round(distributed.mean(step))):
            what = f"the processes do not see the same checkpoints in {self.folder}"
            raise StageError(f"{what}: put it where all can read it")
        if step == 0 and self.folder is not None and distributed.first():
            if self._files():
                why = "the checkpoints here are damaged, or of other parameters, data, code or threads"
                print(f"starting anew: {why}", file=sys.stderr)
            discard(self.folder)
        return step

    def _restored(self, parts: dict) -> int:
        for path in self._files():
            try:
                state, tensors = read_state(path)
            except (OSError, ValueError, SafetensorError):
                continue  # torn or damaged: the one before it
            if state["identity"] != self.identity:
                continue
            saved = unpack(state["parts"], tensors)
            for name, part in parts.items():
                restore(part, saved[name])
            random.setstate(saved["python"])
            np.random.set_state(saved["numpy"])
            torch.set_rng_state(saved["torch"])
            self.rows = saved["rows"]
            if distributed.first():
                for row in self.rows:
                    self._log(**row)
                print(f"resumed after step {state['step']}", file=sys.stderr)
            return state["step"]
        return 0

    def after(self, step: int, parts: dict, last: bool = False) -> None:
        """Call when step number ``step`` (from 1) is finished: saves if it is time, and leaves if a signal came."""
        if self.folder is None:
            return
        due = time.monotonic() - self._saved >= max(self.seconds, self._cost / SHARE)
        stop = distributed.either(self._signal is not None)  # of several processes all leave after the same step
        if (due or last or stop) and distributed.first():
            self.save(step, parts)
        if stop:
            self._leave()

    def save(self, step: int, parts: dict) -> None:
        """Write the state after ``step`` steps aside and rename it. Raises ``StageError``."""
        started = time.monotonic()
        state = {name: captured(part) for name, part in parts.items()}
        state |= {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}
        state |= {"torch": torch.get_rng_state()}
        self.folder.mkdir(parents=True, exist_ok=True)
        data = pack({"step": step, "identity": self.identity}, state | {"rows": self.rows})
        write_bytes(self.folder / f"step-{step:08d}.safetensors", data)
        for old in self._files()[KEPT:]:
            discard(old)
        self._saved = time.monotonic()
        self._cost = self._saved - started

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True) if self.folder else []


def captured(part):
    """The state of one part as a tree of tensors and plain values."""
    if hasattr(part, "state_dict"):
        return part.state_dict()
    if isinstance(part, random.Random):
        return part.getstate()
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part


def restore(part, saved) -> None:
    """Put a captured state back into the part it came from."""
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(saved)
    elif isinstance(part, random.Random):
        part.setstate(saved)
    elif isinstance(part, torch.Generator):
        part.set_state(saved)
    elif isinstance(part, list):
        part[:] = saved
    else:
        part.clear()
        part.update(saved)


def pack(head: dict, tree) -> bytes:
    """Return a safetensors file: the tensors of ``tree``; its rest, ``head`` and a checksum are JSON in the header."""
    tensors, names = {}, {}

    def plain(value):
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
            if key not in names:  # tied weights are stored once
                names[key] = f"t{len(names)}"
                tensors[names[key]] = value.detach().contiguous().cpu()
            return {"tensor": names[key]}
        if isinstance(value, np.ndarray):
            return {"array": value.tolist(), "dtype": str(value.dtype)}
        if isinstance(value, dict):
            return {"dict": [[plain(k), plain(v)] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [plain(v) for v in value]}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"a {type(value).__name__} cannot be saved in a checkpoint")

    text = json.dumps(head | {"parts": plain(tree)})
    return save(tensors, {"format": FORMAT, "state": text, "sha256": _digest(text, tensors)})


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def read_state(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and tensors of a checkpoint file. Raises ``ValueError`` where format or checksum do not hold."""
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header.get("format") != FORMAT or header.get("sha256") != _digest(header.get("state", ""), tensors):
        raise ValueError(f"{path} is damaged or not a checkpoint of this version")
    return json.loads(header["state"]), tensors


def unpack(value, tensors: dict[str, torch.Tensor]):
    """The tree that :func:`pack` was given."""
    if not isinstance(value, dict):
        return value
    (kind, inner), *rest = value.items()
    if kind == "tensor":
        return tensors[inner].clone()  # nothing may share memory with the mapped file
    if kind == "array":
        return np.array(inner, dtype=rest[0][1])
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in inner}
    return (tuple if kind == "tuple" else list)(unpack(v, tensors) for v in inner)
