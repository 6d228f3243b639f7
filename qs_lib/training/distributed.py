"""Several processes, one training: each works on its share of every global batch, and all take the same step.

The training loops run unchanged under torchrun, on one machine or several:

    # bake.py:  torchrun --standalone --nproc_per_node 2 bake.py
    distributed.distributed.start(expected=2)
    model, tokenizer = qs.load_champion(...)
    qs.bake(model, tokenizer, ...)
    if distributed.distributed.first():
        model.save_pretrained(...)

Batch sizes are those of all processes together. Draws come from the same seeds in each process, so that all see the same
global batch; a loss is a mean over it, and gradients are averaged. The result is the single process's up to the rounding of
sums. Bars, metrics and checkpoints are the first process's; validation and the teacher's replies are computed by each, for
they would only wait for each other. In a single process every function here does nothing.

Accelerate starts the same process group (``Accelerator()`` in place of ``start``): hand the loops the model itself, not the
prepared one.
"""

import hashlib
import os
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from ..errors import TrainingError, WorkbookError
from ..thoughts.attention import layers


def start(expected: int | None = None) -> int:
    """Join the process group that torchrun describes, if any; returns the number of processes.

    ``expected``: raise ``WorkbookError`` unless there are so many; some launchers start one alone without a word.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if expected is not None and count() != expected:
        raise WorkbookError(
            f"{count()} of {expected} processes were started: run it with `torchrun --nproc_per_node {expected}`"
        )
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


def share(rows):
    """This process's part of a global batch (a list, or anything that is sliced); a batch too small to split is
    everyone's, which leaves the mean as it is."""
    return rows if count() == 1 or len(rows) < count() else rows[rank() :: count()]


def total(values: torch.Tensor, how=None) -> torch.Tensor:
    """Sum (or ``how``, a ``ReduceOp``) over the processes, elementwise, on the values' device."""
    if count() == 1:
        return values
    there = "cuda" if dist.get_backend() == "nccl" else "cpu"
    moved = values.detach().to(there, copy=True)
    dist.all_reduce(moved, how or dist.ReduceOp.SUM)
    return moved.to(values.device)


def mean(value: float) -> float:
    """Mean of a number over the processes; not finite for all if it is not for one."""
    return value if count() == 1 else total(torch.tensor(value, dtype=torch.float64)).item() / count()


def means(metrics: dict) -> dict:
    """The same for each number of a dict."""
    return metrics if count() == 1 else {name: mean(value) for name, value in metrics.items()}


def either(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return flag if count() == 1 else total(torch.tensor(float(flag))).item() > 0


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")  # a DTensor; not every build of torch has them


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered where it is sharded (all processes must call)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def weigh(loss: torch.Tensor, over) -> torch.Tensor:
    """A mean over ``over`` samples of this process, scaled so that its mean over processes is that over all samples."""
    if count() == 1:
        return loss
    over = torch.as_tensor(over, dtype=torch.float64, device=loss.device)
    return loss * (over * count() / total(over).clamp_min(1e-12)).to(loss.dtype)


@torch.no_grad()
def average(parameters) -> None:
    """Replace gradients by their mean over the processes; one that has none anywhere keeps none, and those of sharded
    weights are that mean already."""
    if count() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad and not is_sharded(p)]
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

    names = ("tokens", "logprobs", "sampled", "lengths", "positions")
    return replace(thoughts, hidden=None, **{name: whole(getattr(thoughts, name)) for name in names})


def checksum(model) -> str:
    """The SHA-256 of the weights as this process holds them, sharded ones gathered (all processes must call)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(
            name.encode() + whole(value).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def check_equal(model, when: str) -> str:
    """The :func:`checksum` of the weights, "" in a single process; raises ``TrainingError`` where two processes differ in it."""
    if count() == 1:
        return ""
    digest = checksum(model)
    number = torch.tensor([int(digest[:12], 16)])
    if (total(number, dist.ReduceOp.MIN) != total(number, dist.ReduceOp.MAX)).any():
        raise TrainingError(
            f"the processes hold different weights {when}: load the same model and seed torch alike in each"
        )
    return digest


def shard(model) -> None:
    """Spread the decoder layers' weights of a causal LM over the processes, in place; nothing in a single one."""
    if count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # not in every build of torch
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (count(),))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)


def check_fsdp(fsdp: bool, checkpoint, lora_rank: int = 0) -> None:
    """Raises ``WorkbookError`` for what cannot be had together with sharded weights."""
    if fsdp and (lora_rank or getattr(checkpoint, "folder", None)):
        what = "an adapter (lora_rank)" if lora_rank else "a checkpoint on disk"
        raise WorkbookError(f"fsdp=True goes without {what}: leave one of them out")


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; changes of it are changes of the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather_like(mine: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole of what each process holds a :func:`part` of, laid out like a parameter."""
    if not is_sharded(parameter):
        return mine
    from torch.distributed.tensor import DTensor

    laid = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(mine, parameter.device_mesh, parameter.placements, **laid).full_tensor()


def part_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut like a parameter."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
    ).to_local()


def whole_state(model) -> dict[str, torch.Tensor]:
    """The ``state_dict`` with whole tensors (all processes must call)."""
    return {name: whole(value) for name, value in model.state_dict().items()}


@contextmanager
def gathered(model):
    """Within it every process holds all weights of a sharded causal LM, for passes that processes take differing numbers of."""
    sharded = [layer for layer in layers(model) if hasattr(layer, "set_reshard_after_forward")]
    for layer in sharded:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in sharded:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def clip_grad_norm(parameters, most: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` for parameters of which some are sharded."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(map(is_sharded, grads)):
        torch.nn.utils.clip_grad_norm_(parameters, most)
        return
    squares = [sum(part(g).float().square().sum() for g in grads if is_sharded(g) == there) for there in (True, False)]
    norm = (total(torch.as_tensor(squares[0])) + squares[1]).sqrt()
    torch._foreach_mul_([part(g) for g in grads], (most / (norm + 1e-6)).clamp(max=1.0))
