"""FSDP2 for weights that do not fit into one process: each holds its part of every decoder layer.

``fsdp=True`` of the training loops calls :func:`shard`. A layer's weights are gathered while it computes, and all layers'
while thoughts are drawn, for there processes take different numbers of steps. Embeddings, head and norms stay whole in
each: they are read by name. Of an optimizer each process keeps the part of its own weights; Muon, which needs whole matrices,
gathers their updates. Save the model with ``model.save_pretrained(folder, state_dict=whole_state(model))``,
which all processes must call.
"""

from contextlib import contextmanager

import torch

from . import ranks
from .errors import WorkbookError
from .ranks import is_sharded, whole
from .thoughts.attention import layers


def shard(model) -> None:
    """Spread the decoder layers' weights of a causal LM over the processes, in place; nothing in a single one."""
    if ranks.count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # not in every build of torch
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (ranks.count(),))
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

    return distribute_tensor(tensor.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


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
    norm = (ranks.total(torch.as_tensor(squares[0])) + squares[1]).sqrt()
    torch._foreach_mul_([part(g) for g in grads], (most / (norm + 1e-6)).clamp(max=1.0))
