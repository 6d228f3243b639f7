"""Word problems as templates: numbers can be redrawn, every equation is verified, and splits go by template."""

import ast
import csv
import hashlib
import os
import random
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..errors import SourceError, WorkbookError
from . import Problem
from .strategies import ARITHMETIC, SIGN_OF, fitting, result

COLUMNS = ("Question", "Numbers", "Equation", "Answer")
FAMILY = "word problem"
ANSWERS_BELOW = 10_000
TRIES = 100  # draws of numbers until an equation comes out as it should
_PLACE = re.compile(r"number(\d+)")
_PLAIN = re.compile(r"\d{1,9}(\.\d{1,9})?")
_DIVISION = re.compile(r"/ number(\d+) number(\d+)")
_CALCULATED = re.compile(r"<gadget[^>]*>(.*?)</gadget>", re.DOTALL)
_SPACING = [  # what a tokenizer has cut apart, in the order in which it is mended
    (r"`` ?(.*?) ?''", r'"\1"'),
    (r" ' ?(s|ve|re|ll|d|m)\b", r"'\1"),
    (r" n't\b", "n't"),
    (r"(?<=s) '(?!\S)", "'"),
    (r"(?<!\S)' ?([^']+?) '(?!\S)", r"'\1'"),
    (r" ([.,?!;:%)])(?!\d)", r"\1"),
    (r"([($]) ", r"\1"),
    (r"(?<=\w) - (?=\w)", "-"),
]


class Template(NamedTuple):
    """A row of a table: its numbers go into the places ``number0``, ``number1``, ... of question and equation."""

    question: str
    numbers: tuple[str, ...]
    equation: str  # in prefix form, such as "- number0 * number1 2"
    answer: str


def natural(text: str) -> str:
    """Return text whose words and stops were cut apart (``did n't pay $ 4 .``) as a person writes it."""
    text = " ".join(text.replace("’", "'").split())
    for cut, mended in _SPACING:
        text = re.sub(cut, mended, text)
    return text


@lru_cache(10_000)
def plain(text: str) -> str:
    """Return a number as a person writes it (``41``, ``0.25``). Raises ``ValueError`` if none would write it so."""
    if not _PLAIN.fullmatch(text):
        raise ValueError(f"not a plain number: {text!r}")
    return _written(Fraction(text))


def _written(value: Fraction) -> str:
    if value < 0 or 100 % value.denominator:
        raise ValueError(f"{value} is negative or has more than two decimals")
    if value.denominator == 1:
        return str(value.numerator)
    return format(Decimal(value.numerator) / value.denominator, "f")


def worked_steps(prefix: str) -> list[str]:
    """Return the equations, one operation each, that work out an expression in prefix form, in order.

    ``- 9 * 2 3`` gives ``2 * 3 = 6`` and ``9 - 6 = 3``. Raises ``ValueError`` unless it is one complete expression in
    which every number is one that a person would write.
    """
    tokens, steps = iter(prefix.split()), []

    def value() -> Fraction:
        if (token := next(tokens)) not in ARITHMETIC:
            return Fraction(plain(token))
        left, right = value(), value()
        made = ARITHMETIC[token](left, right)
        steps.append(f"{_written(left)} {token} {_written(right)} = {_written(made)}")
        return made

    try:
        value()
    except (StopIteration, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"not a plain expression: {prefix[:60]!r}") from error
    if next(tokens, None) is not None:
        raise ValueError(f"not one expression: {prefix[:60]!r}")
    return steps


def to_prefix(infix: str) -> str:
    """Turn ``( 9.0 - 2.0 )`` into ``- 9.0 2.0``. Raises ``ValueError`` on anything but + - * / ( ) and numbers."""

    def walk(node) -> str:
        if isinstance(node, ast.BinOp) and type(node.op) in SIGN_OF:
            return f"{SIGN_OF[type(node.op)]} {walk(node.left)} {walk(node.right)}"
        return ast.unparse(node)

    try:
        if re.fullmatch(r"[\d.+*/() -]+", infix):
            return walk(ast.parse(infix.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        pass
    raise ValueError(f"not plain arithmetic: {infix[:60]!r}")


def problem_of(template: Template) -> Problem | None:
    """Return the problem of a template, verified, or None.

    It is kept if its equation gives exactly its answer, a whole number below 10,000, and all numbers on the way are
    whole or have at most two decimals, none of them negative.
    """
    problem = _solved(template.question, template.numbers, template.equation)
    try:
        return problem if problem and problem["answer"] == plain(template.answer) else None
    except ValueError:
        return None


def _solved(question: str, numbers: tuple[str, ...], equation: str) -> Problem | None:
    """Put numbers into a template and work it out, or return None where a rule is broken."""
    try:
        numbers = [plain(x) for x in numbers]
        question, equation = (_PLACE.sub(lambda place: numbers[int(place[1])], text) for text in (question, equation))
        steps = worked_steps(equation)
    except (ValueError, IndexError):
        return None
    if not steps or "." in (answer := result(steps[-1])) or int(answer) >= ANSWERS_BELOW:
        return None
    record = {"question": question, "answer": answer, "steps": steps, "difficulty": len(steps)}
    fits, turn = fitting(steps), int(hashlib.md5(question.encode()).hexdigest(), 16)
    turn %= len(fits) or 1  # a prompted teacher takes the first: all strategies come first somewhere
    return record | {"family": FAMILY, "fits": fits[turn:] + fits[:turn], "lead": []}


def split_of_template(question: str) -> str:
    """Return ``test``, ``validation`` or ``train``: two tenths, one tenth and the rest, by the MD5 of the template.

    A question and its template fall together: case, spaces, stops and the numbers themselves do not count.
    """
    words = re.sub(r"[^\w#]|_", "", re.sub(r"number\d+|\d+(?:[.,]\d+)*", "#", question.lower()))
    part = int(hashlib.md5(words.encode()).hexdigest(), 16) % 10
    return "test" if part < 2 else "validation" if part == 2 else "train"


def read_templates(path: Path) -> list[Template]:
    """Read every row of a table with the columns Question, Numbers, Equation and Answer, in any order.

    Raises ``SourceError`` for a file that cannot be read, and ``WorkbookError`` naming the line of a wrong row.
    """
    found = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise WorkbookError(f"{path}:1 has no column {missing[0]}: a table has {', '.join(COLUMNS)}")
            for row in rows:
                if None in row or None in row.values():
                    raise WorkbookError(f"{path}:{rows.line_num} has not the {len(rows.fieldnames)} columns of line 1")
                question, numbers, equation, answer = (row[name] for name in COLUMNS)
                if not question.strip():
                    raise WorkbookError(f"{path}:{rows.line_num}: the question is blank")
                found.append(Template(natural(question), tuple(numbers.split()), equation, answer.strip()))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise WorkbookError(f"{path} is not a table in UTF-8 with commas ({error})") from None
    return found


def redraw(template: Template, rng: random.Random) -> Problem | None:
    """Return a template's problem with new numbers, verified, or None if none is found.

    The new numbers have the size of the old ones and as many decimals. They are equal just where those are, so that an
    equation which takes one for the other stays right. Results are whole and above 0 where the old ones are.
    """
    if (given := problem_of(template)) is None:
        return None
    old = [plain(x) for x in template.numbers]
    fixed = {"0", "1"}  # "1 cat" is in the singular
    fixed |= {plain(token) for token in template.equation.split() if _PLAIN.fullmatch(token)}
    divisions = [(old[int(over)], old[int(under)]) for over, under in _DIVISION.findall(template.equation)]
    alike = lambda old, new: ("." in old or "." not in new) and (old == "0" or new != "0")
    for _ in range(TRIES):
        new = {x: x if x in fixed else _drawn(x, rng) for x in old}
        for over, under in divisions:  # drawn apart, few numbers would divide
            quotient = Fraction(over) / Fraction(under)
            if quotient.denominator == 1 and over not in fixed:
                new[over] = _written(Fraction(new[under]) * Fraction(_drawn(str(quotient), rng)))
        if len(set(new.values())) < len(new):
            continue
        drawn = _solved(template.question, tuple(new[x] for x in old), template.equation)
        if drawn and all(map(alike, map(result, given["steps"]), map(result, drawn["steps"]))):
            return drawn
    return None


def _drawn(old: str, rng: random.Random) -> str:
    """Draw a number from 2 to a bit above ``old``, as round as it is."""
    whole, _, decimals = old.partition(".")
    zeros = 0 if decimals else len(old) - len(old.rstrip("0"))
    unit = Fraction(10) ** (max(0, zeros - 1) - len(decimals))
    least = max(1, int((2 if int(whole) > 1 else 0) / unit))
    return _written(unit * rng.randint(least, int(Fraction(old) / unit * 5 / 4) + 3))


def table_of(source: str) -> Path | None:
    """Return the table that ``source`` is, or the only one of a folder without ``train.jsonl``, or None."""
    path = Path(os.path.expanduser(source))  # Path's own raises for an unknown user's home
    if path.is_file() and path.suffix.lower() == ".csv":
        return path
    tables = [] if (path / "train.jsonl").is_file() else list(path.glob("*.csv"))
    return tables[0] if len(tables) == 1 else None


def problems_of(path: Path, split: str) -> list[Problem]:
    """Return the verified problems of one split of a table."""
    rows = [t for t in read_templates(path) if split_of_template(t.question) == split]
    return [p for p in map(problem_of, rows) if p]


def redrawn(path: Path, count: int, seen: set[str], seed: int = 0) -> list[Problem]:
    """Draw ``count`` problems, none of them ``seen``, from a table's training templates in turn.

    Templates of a rare shape (the strategies that fit) have several turns a round: else too few problems would fit a
    strategy that few templates fit. There are fewer problems where the templates hold no more.
    """
    rng, seen, found = random.Random(f"{seed}-train"), set(seen), []
    rows = {t.question: t for t in read_templates(path) if split_of_template(t.question) == "train"}
    shapes = {t: tuple(sorted(p["fits"])) for t in rows.values() if (p := problem_of(t))}
    sizes = Counter(shapes.values())
    turns = [t for t, shape in shapes.items() for _ in range(round((max(sizes.values()) / sizes[shape]) ** 0.6))]
    rng.shuffle(turns)
    spent = set()  # templates that hold no more
    while turns and len(found) < count:
        for template in turns[: count - len(found)]:
            draws = (None if template in spent else redraw(template, rng) for _ in range(TRIES))
            drawn = next((p for p in draws if p is None or p["question"] not in seen), None)
            if drawn is None:
                spent.add(template)
            else:
                seen.add(drawn["question"])
                found.append(drawn)
        turns = [t for t in turns if t not in spent]
    return found


def told(row: dict) -> tuple[str, str, str]:
    """Return question, worked answer and family of a row in the form of GSM8K, SVAMP or Calc-ASDiv.

    The last two are brought into GSM8K's form. Their equations are left out where ``worked_steps`` refuses them.
    """
    if "answer" not in row and "Body" in row:
        before, question = natural(row["Body"]), natural(row["Question"])
        if before[-1:] not in ".?!,;:":  # "If he had $4 at the start" goes on as one sentence
            before, question = f"{before},", re.sub("^(How|What)", lambda word: word[0].lower(), question)
        question = f"{before} {question}"
        expressions, answer = [row["Equation"]], str(row["Answer"])
    elif "answer" not in row and "chain" in row:
        question, expressions = natural(row["question"]), _CALCULATED.findall(row["chain"])
        answer = str(row["result"]).partition(" = ")[0].replace("_", "")
    else:
        return row["question"], row["answer"], "gsm8k"
    try:
        steps = [step for e in expressions for step in worked_steps(to_prefix(e.replace("_", "")))]
    except ValueError:
        steps = []
    worked = "".join("<<" + step + ">>" for step in steps)
    return question, f"{worked}\n#### {answer}", FAMILY
