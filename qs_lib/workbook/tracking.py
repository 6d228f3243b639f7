"""Training metrics in TensorBoard or trackio, beside ``metrics.jsonl``, which stays the record."""

import os
from pathlib import Path

from ..errors import WorkbookError
from ..evaluation.episodes import Episode


def tensorboard(log, folder: str | Path):
    """Return a function that passes metrics on to ``log`` and writes their numbers as scalars at ``metrics["step"]``.

    Without ``QS_TENSORBOARD`` in the environment it is ``log``. Raises ``WorkbookError`` if the package is missing.
    """
    if not os.environ.get("QS_TENSORBOARD"):
        return log
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise WorkbookError("QS_TENSORBOARD needs TensorBoard: `pip install tensorboard`, or unset it") from None
    writer = SummaryWriter(folder)

    def both(**metrics):
        log(**metrics)
        for name, value in metrics.items():
            if name != "step" and isinstance(value, (int, float)):
                writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return both


def trackio(log, name: str):
    """Return the same for a new run of a trackio project, and what ends it with a trace for each of some episodes.

    ``QS_TRACKIO`` in the environment names the project, and without it nothing is tracked. A parameter would belong to
    what is trained, so that tracking would repeat it. Raises ``WorkbookError`` if the trackio package is missing.
    """
    if not os.environ.get("QS_TRACKIO"):
        return log, lambda episodes: None
    try:
        import trackio as tracker
    except ImportError:
        raise WorkbookError("QS_TRACKIO needs trackio: `pip install trackio`, or unset it") from None
    run = tracker.init(os.environ["QS_TRACKIO"], name, embed=False)

    def both(**metrics):
        log(**metrics)
        run.log({key: x for key, x in metrics.items() if key != "step"}, metrics["step"])

    def finish(episodes: list[Episode]):
        for e in episodes:
            said = [e.question, *("".join(t.tokens) for t in e.thoughts), e.answer_with]
            messages = [{"role": "assistant" if i else "user", "content": text} for i, text in enumerate(said)]
            run.log({f"problem {e.problem}": tracker.Trace(messages, {"answer": e.answer})}, e.step)
        run.finish()

    return both, finish
