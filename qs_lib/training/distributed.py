"""Several processes, one training: each works on its share of every global batch, and all take the same step.

A script that torchrun starts, on one machine or several, calls ``start`` first and saves where ``first()`` holds, as
notebook 09 shows. Accelerate starts the same process group (``Accelerator()`` in place of ``start``): hand the loops
the model itself, not the prepared one.

Batch sizes are those of all processes together. Draws come from the same seeds in each process, so that all see the
same global batch. A loss is a mean over it, and gradients are averaged. The result is the single process's up to the
rounding of sums. Bars, metrics and checkpoints are the first process's. Validation and the teacher's replies are
computed by each, for they would only wait for each other. In a single process every function here does nothing.
"""

import hashlib
import os
from dataclasses import replace

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from ..errors import TrainingError, WorkbookError


def start(expected: int | None = None) -> int:
    """Join the process group that torchrun describes, if any; returns the number of processes.

    ``expected``: raise ``WorkbookError`` unless there are so many; some launchers start one alone without a word.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if expected is not None and count() != expected:
        again = f"run it with `torchrun --nproc_per_node {expected}`"
        raise WorkbookError(f"{count()} of {expected} processes were started: {again}")
    return count()


def count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def bar(*args, **settings) -> tqdm:
    """Return a progress bar, which the first process shows unless ``TQDM_DISABLE=1`` stands in the environment."""
    return tqdm(*args, **settings) if first() else tqdm(*args, disable=True, **settings)


def share(rows):
    """This process's part of a global batch. One too small to split is everyone's, which leaves the mean as it is."""
    return rows if count() == 1 or len(rows) < count() else rows[rank() :: count()]


def total(values: torch.Tensor, how: str = "SUM") -> torch.Tensor:
    """Sum (or ``how``, the name of a ``ReduceOp``) over the processes, elementwise, on the values' device."""
    if count() == 1:
        return values
    there = "cuda" if dist.get_backend() == "nccl" else "cpu"
    moved = values.detach().to(there, copy=True)
    dist.all_reduce(moved, getattr(dist.ReduceOp, how))
    return moved.to(values.device)


def mean(value: float) -> float:
    """Mean of a number over the processes; not finite for all if it is not for one."""
    return total(torch.tensor(value, dtype=torch.float64)).item() / count()


def either(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return total(torch.tensor(float(flag))).item() > 0


def weigh(loss: torch.Tensor, over) -> torch.Tensor:
    """A mean over ``over`` samples of this process, scaled so that its mean over processes is that over all samples."""
    if count() == 1:
        return loss
    over = torch.as_tensor(over, dtype=torch.float64, device=loss.device)
    return loss * (over * count() / total(over).clamp_min(1e-12)).to(loss.dtype)


@torch.no_grad()
def average(parameters) -> None:
    """Replace gradients by their mean over the processes. One that is nowhere keeps none."""
    if count() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    there = total(torch.tensor([float(p.grad is not None) for p in parameters]))
    for p, has in zip(parameters, there.tolist(), strict=True):
        if has:
            p.grad = total(torch.zeros_like(p) if p.grad is None else p.grad) / count()


def gather_thoughts(thoughts, rows: torch.Tensor, size: int):
    """The thoughts of all ``size`` rows of the global batch, from each process's for its ``rows``."""
    if count() == 1 or len(rows) == size:
        return thoughts

    def whole(part):
        full = torch.zeros(size, *part.shape[1:], dtype=part.dtype, device=part.device)
        full[rows] = part
        return total(full.int()).bool() if part.dtype == torch.bool else total(full)

    return replace(thoughts, hidden=None).map(whole)


def checksum(model) -> str:
    """Return the SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_equal(model, when: str) -> str:
    """Return the :func:`checksum` of the weights, "" in a single process. Raises ``TrainingError`` if they differ."""
    if count() == 1:
        return ""
    digest = checksum(model)
    number = torch.tensor([int(digest[:12], 16)])
    if (total(number, "MIN") != total(number, "MAX")).any():
        advice = "load the same model and seed torch alike in each"
        raise TrainingError(f"the processes hold different weights {when}: {advice}")
    return digest
