"""Which episodes the inspector shows, in which order: by filter, by search, by step of training."""

from pathlib import Path
from statistics import fmean

from ..errors import WorkbookError
from ..evaluation.episodes import Episode, read_episodes
from .html import helped, right_or_wrong, spacing

FILTERS = {
    "all": lambda episodes: episodes,
    "wrong": lambda episodes: [e for e in episodes if right_or_wrong(e.answer_with, e.answer) == "wrong"],
    "right": lambda episodes: [e for e in episodes if right_or_wrong(e.answer_with, e.answer) == "right"],
    "thoughts disagree": lambda episodes: [e for e in episodes if len({t.answer for t in e.thoughts}) > 1],
    "most helped": lambda episodes: sorted((e for e in episodes if helped(e) > 0), key=helped, reverse=True),
    "most hurt": lambda episodes: sorted((e for e in episodes if helped(e) < 0), key=helped),
}
SORTS = {
    "as chosen": lambda e: 0,
    "utility, best first": lambda e: -helped(e),
    "coherence, best first": lambda e: -fmean([t.coherence.get("composite", 0.0) for t in e.thoughts] or [0.0]),
    "hardest first": lambda e: -e.difficulty,
    "most different answers first": lambda e: -len({t.answer for t in e.thoughts}),
}


def episodes_of(source) -> list[Episode]:
    """Return the episodes of a list or a file. Raises ``WorkbookError`` for the dots of a copied line."""
    if source is ...:
        raise WorkbookError("a copied line has three dots: put your own episodes, model and tokenizer in their place")
    return read_episodes(source) if isinstance(source, (str, Path)) else list(source)


def has(episode: Episode, text: str) -> bool:
    """Say whether a problem or one of its thoughts has ``text`` in it, upper and lower case alike."""
    written = [episode.question, *(spacing(t.tokens).join(t.tokens) for t in episode.thoughts)] if text else []
    return text.casefold() in "\n".join(written).casefold()


def by_step(episodes: list[Episode], name: str, live: bool) -> dict[str, list[Episode]]:
    """Return the episodes of a checkpoint by label: those of each training step, where there are several, then others.

    ``live``: whether there is a model to draw more, which belong to the others. It can at the last step's problems.
    """
    steps = sorted({e.step for e in episodes if e.step is not None})
    if len(steps) < 2:
        return {name: episodes}
    found = {f"step {s:,}{name and f' of {name}'}": [e for e in episodes if e.step == s] for s in steps}
    rest = [e for e in episodes if e.step is None]
    rest = rest or [without_thoughts(e) for e in episodes if live and e.step == steps[-1]]
    return found | ({name or "now": rest} if rest else {})


def without_thoughts(episode: Episode, **changes) -> Episode:
    """Return the episode as it was before thoughts were drawn, with ``changes``."""
    names = {"problem", "question", "answer", "family", "difficulty", "position", "tokens"}
    return Episode(**episode.model_dump(include=names) | {"thoughts": []} | changes)
