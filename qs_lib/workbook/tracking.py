"""Training metrics in TensorBoard, beside ``metrics.jsonl``, which stays the record."""

from pathlib import Path

from ..errors import WorkbookError


def tensorboard(log, folder: str | Path):
    """Return a function that passes metrics on to ``log`` and writes their numbers as scalars at ``metrics["step"]``.

    Raises ``WorkbookError`` if the tensorboard package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise WorkbookError("tensorboard=True needs TensorBoard: `pip install tensorboard`, or leave it off") from None
    writer = SummaryWriter(folder)

    def both(**metrics):
        log(**metrics)
        for name, value in metrics.items():
            if name != "step" and isinstance(value, (int, float)):
                writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return both
