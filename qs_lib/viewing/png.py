"""An episode as a picture: its text, and each thought with its tokens in the colour of their surprise."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from ..evaluation.episodes import Episode
from ..files import atomic_write
from ..stats import fixed
from .escape import safe_line
from .html import MOST_TOKENS, ORANGE, spacing

WIDTH = 110  # characters a line
SIZE = 9  # points of the type, whose characters are 0.6 of it wide
LINE = 0.2  # inches
Piece = tuple[int, str, float]  # the column of a text, the text, and how opaque its colour is (0 to 1)


def save_png(episode: Episode, path: str | Path) -> Path:
    """Write the view of one problem as a picture that needs no browser: the same words and numbers as its HTML."""
    lines = _lines(episode)
    figure = Figure(figsize=(WIDTH * 0.6 * SIZE / 72 + 0.4, LINE * len(lines) + 0.4), dpi=150, facecolor="white")
    width, height = figure.get_size_inches()
    for row, pieces in enumerate(lines):
        for column, text, strength in pieces:
            x, y = (0.2 + column * 0.6 * SIZE / 72) / width, 1 - (0.3 + LINE * row) / height
            box = {"facecolor": ORANGE, "alpha": strength, "pad": 0.8, "lw": 0} if strength else None
            figure.text(x, y, text, size=SIZE, family="monospace", color="black", bbox=box, parse_math=False)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _lines(e: Episode) -> list[list[Piece]]:
    """Lay an episode out in lines of pieces."""
    told = f"without thoughts: {e.answer_without or '-'}; with thoughts: {e.answer_with or '-'}; truth: {e.answer}"
    lines = [[(0, line, 0.0)] for text in (e.question, told) for line in textwrap.wrap(safe_line(text), WIDTH)]
    for number, thought in enumerate(e.thoughts, 1):
        facts = f"Thought {number}: answer {safe_line(thought.answer)}, weight {fixed(thought.weight, 2)}"
        facts += "" if thought.utility is None else f", gain {fixed(thought.utility, 2, signed=True)} nats"
        lines += [[], [(0, facts, 0.0)], *_wrapped(thought)]
    return lines


def _wrapped(thought) -> list[list[Piece]]:
    """Break a thought's coloured tokens into lines."""
    lines, column, gap = [[]], 0, len(spacing(thought.tokens))
    for token, logprob in list(zip(thought.tokens, thought.logprobs, strict=False))[:MOST_TOKENS]:
        text = safe_line(token.replace("\n", "\u23ce").replace("\r", ""))[:WIDTH] or " "
        if column + len(text) > WIDTH:
            lines, column = [*lines, []], 0
        lines[-1].append((column, text, min(0.5, max(0.0, -logprob) * 0.2)))
        column += len(text) + gap
    return lines
