"""Every error that one sentence explains."""

import os
import traceback


class WorkbookError(ValueError):
    """An error that one sentence explains: notebooks show the sentence and no traceback (QS_DEBUG=1 brings it back)."""

    def _render_traceback_(self):  # IPython asks for this name
        if os.environ.get("QS_DEBUG"):
            return traceback.format_exception(self)
        return [f"{type(self).__name__}: {self}"]


class TrainingError(WorkbookError, FloatingPointError):
    """A loss or gradient is not finite. Nothing was updated with it."""


class UnwatchedError(WorkbookError, RuntimeError):
    """A family computes its attention where its logits cannot be seen."""


class SourceError(WorkbookError, FileNotFoundError):
    """A model or data set is not where it was said to be, or cannot be read."""


class HubError(WorkbookError, ConnectionError):
    """The hub does not answer, or does not have what was asked for."""


class ParameterError(WorkbookError):
    """A parameter is unknown, missing or has a value that cannot be used."""


class StageError(WorkbookError):
    """A run folder cannot be used or written."""


class UpstreamError(WorkbookError):
    """What an earlier stage should have made is missing, unfinished or changed."""


def at_least(least: int, **sizes) -> None:
    """Check sizes by name: each a number, or several. Raises ``ParameterError`` naming one below ``least``."""
    for name, given in sizes.items():
        for size in given if isinstance(given, (list, tuple, range)) else [given]:
            if not size >= least:
                raise ParameterError(f"{name} is {size}; it must be at least {least}")
