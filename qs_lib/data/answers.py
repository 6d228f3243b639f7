"""Answers as text: the number that a data set or a reply gives, read in one way everywhere."""

import contextlib
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from ..errors import WorkbookError

_ALIKE = str.maketrans(dict.fromkeys("−–—‐‑﹣－", "-") | dict.fromkeys("⁄∕／", "/") | {"’": "'", "，": ",", "．": "."})
_VULGAR = re.compile("[¼-¾⅐-⅞]")  # ½ and its like
_PARTS = re.compile(r"(\D*?)(\.?\d(?:.*\d)?)(\D*)", re.DOTALL)  # from the first digit to the last
_SIGNED = re.compile(r"(.*?)\s*([-+]|\b(?:minus|negative))\s*", re.DOTALL | re.IGNORECASE)
_MAY_PRECEDE_A_SIGN = re.compile(r"(?:.*(?:[:=]|\b(?:is|to)))?", re.DOTALL)
_ENGLISH = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][-+]?\d+)?")  # 1,234.50, .5, 1e6
_SPACED = re.compile(r"\d{1,3}([ '])\d{3}(?:\1\d{3})*(?:\.\d+)?")  # 1 000.5, 1'000
_EUROPEAN = re.compile(r"\d{1,3}(?:(?:\.\d{3}|(?: \d{3}))+,\d+|(?:\.\d{3}){2,})")  # 1.000,50, 1.000.000
_FRACTION = re.compile(r"(?:(\d+) )?([1-9]\d*) ?/ ?([1-9]\d*)")  # 3/4, 5 1/2
_WORDS_OF_SCALE = "hundred|thousand|mill[io]on|milliard|[bt]rillion|lakh|crore|dozen|half|halves"
_SCALE = re.compile(rf"^ ?(?:k|K|M|B|bn|mn|mio|Mio|Mrd)\b|\b(?i:{_WORDS_OF_SCALE})")  # what changes the number
_WITHIN_A_TEXT = re.compile(r"(?<![\w)])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\d+(?:\.\d+)?")
LARGEST_ANSWER = 10**15


def written_number(text: str) -> str:
    """Return the one number that stands in ``text``, in plain digits: ``-5``, ``0.75`` or ``1234.5``.

    It may have a sign, a currency, a unit, an exponent, thousands set apart, and be a fraction that has an end as a
    decimal number: ``-$1,234.50``, ``1 000 km``, ``5 1/2``, ``1.000,50``. Raises ``WorkbookError`` for what could be
    read in several ways (``5,6``, ``2 and 3``, ``10:30``, ``1.5 million``), and beyond 10^15 either way.
    """
    given = text
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]), text).translate(_ALIKE)
    if (parts := _PARTS.fullmatch(re.sub(r"[^\S\r\n]+", " ", text.strip()))) is None:
        raise WorkbookError(f"there is no number in {_short(given)}")
    before, core, after = parts.groups()
    value = _value(core)
    before = "".join(c for c in before if unicodedata.category(c) != "Sc").rstrip(" ")
    if signed := _SIGNED.fullmatch(before):
        before, value = signed[1], value and (value if signed[2] == "+" else -value)
        plain = _MAY_PRECEDE_A_SIGN.fullmatch(before)
    else:
        plain = parts[1].endswith(" ") or not before[-1:].isalpha()
    worded = _words(before, ".:,='\"") and _words(after, ".:;,'\"()%°²³/-")
    more = re.search(r"^[²³]|-(?![^\W\d_]{2})|/(?![^\W\d_])", after)  # a power, a range, a quotient
    if value is None or not plain or not worded or more:
        raise WorkbookError(f"{_short(given)} is not one number that can be read in one way only")
    if _SCALE.search(before) or _SCALE.search(after):
        raise WorkbookError(f"{_short(given)} has a word that changes its number: write it in digits")
    if value and not 1 / LARGEST_ANSWER <= abs(value) <= LARGEST_ANSWER:
        raise WorkbookError(f"{_short(given)} is too {'large' if abs(value) > 1 else 'small'} a number")
    return format((value + 0).normalize(), "f")  # 0 takes the sign of -0 away


def _value(core: str) -> Decimal | None:
    """The value of digits with their marks, or None."""
    if found := _FRACTION.fullmatch(core):
        whole, over, under = (int(part or 0) for part in found.groups())
        exact, value = whole + Fraction(over, under), whole + Decimal(over) / Decimal(under)
        return value if Fraction(value) == exact and (found[1] is None or over < under) else None
    if _EUROPEAN.fullmatch(core):
        core = core.replace(".", "").replace(" ", "").replace(",", ".")
    elif _SPACED.fullmatch(core):
        core = re.sub("[ ']", "", core)
    elif not _ENGLISH.fullmatch(core):
        return None
    return Decimal(core.replace(",", ""))


def _words(text: str, marks: str) -> bool:
    """Whether ``text`` is nothing but words, spaces, currencies and these marks."""
    letters = "".join(c for c in text if c not in marks and not c.isspace() and unicodedata.category(c) != "Sc")
    return all(c.isalpha() and not c.isnumeric() for c in letters)


def _short(text: str) -> str:
    return repr(text.strip()[:40])


def whole_reply(text: str) -> str:
    """Return a written reply as an answer: the text without the spaces around it and its closing stop."""
    return text.strip().removesuffix(".").strip()


def last_number(text: str) -> str:
    """Return the number of a reply that may be a sentence: the only one, or the last, or "" where there is none."""
    for part in (text, *_WITHIN_A_TEXT.findall(text)[-1:]):
        with contextlib.suppress(WorkbookError):
            return written_number(part)
    return ""
