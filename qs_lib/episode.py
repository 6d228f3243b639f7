"""One thought group as a record: the unit of training, logging and inspection (``episodes.jsonl``)."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from .errors import WorkbookError


class Thought(BaseModel):
    """One sampled thought. Log-probs in nats per token (0 for forced tags); ``utility`` is the gain in log-likelihood
    of the true continuation (None where that is not known), ``coherence`` the label-free scores; ``next_tokens`` the
    most likely next tokens after this thought with their probabilities."""

    model_config = ConfigDict(extra="forbid")
    tokens: list[str]
    logprobs: list[float]
    reward: float = 0.0
    advantage: float = 0.0
    utility: float | None = 0.0
    weight: float = 0.0
    coherence: dict[str, float] = {}
    next_tokens: list[tuple[str, float]] = []
    answer: str = ""


class Episode(BaseModel):
    """A text position and the thoughts drawn there. ``tokens`` is the text read so far, the last one at ``position``;
    ``base_tokens`` and ``mixed_tokens`` are the most likely next tokens without thoughts and after mixing. ``answer``
    is None where the truth is not known."""

    model_config = ConfigDict(extra="forbid")
    problem: int
    question: str
    answer: str | None
    family: str = ""
    difficulty: int = 0
    stage: str = ""
    position: int
    tokens: list[str]
    thoughts: list[Thought]
    no_thought_weight: float = 1.0
    base_tokens: list[tuple[str, float]] = []
    mixed_tokens: list[tuple[str, float]] = []
    answer_without: str = ""
    answer_with: str = ""


def read_episodes(path: str | Path) -> list[Episode]:
    """Episodes of a JSON-lines file. Raises ``WorkbookError`` naming the file and line that does not hold one."""
    episodes = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            episodes.append(Episode.model_validate(json.loads(line)))
        except ValueError as error:
            raise WorkbookError(f"{path}:{number} is not an episode: {str(error).splitlines()[0]}") from None
    return episodes
