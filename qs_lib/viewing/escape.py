"""The one way from model text to HTML.

A model can write anything: tags, scripts, terminal codes, marks that turn text around. This is a file of its own
because tests/test_audit.py lets nothing else put text into HTML.
"""

import html
import re

# controls, marks of no width, spaces that are not the space bar's, letters that print nothing, selectors and tags
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\xa0\u00ad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    "\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
# marks set on a letter: a pile of them covers the lines around it
_MARK = (
    "[\u0300-\u036f\u0483-\u0489\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
)
_PILE = re.compile(f"({_MARK}{{3}})({_MARK}+)")
_PICTURES = {"\n": "\u21b5", "\t": "\u21e5", "\x7f": "\u2421"}


def safe_text(text, limit: int = 2000) -> str:
    """Return HTML that shows ``text`` as it is, on one line, and does nothing else.

    Tags and quotes are escaped. Control characters become visible pictures, a line break an arrow. Marks that are
    invisible or reverse the reading direction become their code, as in ``[U+202E]``. Of accents piled on one letter
    three are kept. A text of more than ``limit`` characters is cut, and says so.
    """
    text = str(text)
    shown = html.escape(safe_option(text, limit))
    return shown if len(text) <= limit else f"{shown}\u2026 [{len(text) - limit:,} more characters]"


def safe_option(text, limit: int = 40) -> str:
    """Return ``text`` for what escapes HTML itself, such as a control's label: on one line, nothing unseen in it."""
    return _PILE.sub(lambda m: f"{m[1]}[{len(m[2])} more marks]", _UNSEEN.sub(_visible, str(text)[:limit]))


def _visible(found: re.Match) -> str:
    character = found.group()
    if character in _PICTURES:
        return _PICTURES[character]
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    return f"[U+{ord(character):04X}]"


def safe_token(text: str) -> str:
    """Return a token as :func:`safe_text` does, with spaces at its start shown so that no token looks empty."""
    inner = str(text).strip(" ")
    if not inner:
        return "\u2423" * min(len(str(text)), 8) or "\u2205"
    return ("\u2423" if str(text).startswith(" ") else "") + safe_text(inner, 200)


def safe_line(text: str) -> str:
    """Return ``text`` for a terminal: what moves the cursor or colours it is shown instead, but for lines and bars."""
    kept = re.split("(\\x1b\\[A|[\\n\\r])", text)
    return "".join(part if i % 2 else _UNSEEN.sub(_visible, part) for i, part in enumerate(kept))


def safe_label(text: str) -> str:
    """Return ``text`` for the label of a figure: on one line, and no formula begins at a dollar sign."""
    return safe_option(text).replace("$", r"\$")
