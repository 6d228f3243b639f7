"""Thoughts rewritten as text: one number altered, sums paraphrased, results masked, idle steps left out.

A thought is read in plain words: ``step 9 + 8 = 17 step 17 - 4 = 13``. Its equations are what can be edited. What an
edited thought *implies* is its last number, since every strategy ends on the answer.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from num2words import num2words

from ..data.strategies import OPERATIONS, body, exact_value, holds, operands, result, strategy_of
from ..data.tokens import PLAIN_WORDS, in_words

_SIGN = re.compile(r"([-+*/=()])")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
HIDDEN = "step"  # stands where a number was
FAULTS = "arithmetic", "numbers", "operation", "steps"  # see `fault`


class Equation(NamedTuple):
    """Where an equation stands among the words of a thought: its first word, its result, and the word that opens it."""

    first: int
    result: int
    opening: str


def words_of(text: str) -> list[str]:
    """Return the words of a thought without its outer tags, thinking tokens as their plain words, signs set apart."""
    words = _SIGN.sub(r" \1 ", in_words(text)).split()
    return [w for w in words if w not in (PLAIN_WORDS["<think>"], PLAIN_WORDS["</think>"])]


def equations(words: list[str]) -> list[Equation]:
    """Return the equations of a thought that are plain arithmetic with a number behind the equals sign, in order."""
    found = []
    for i in [i for i, w in enumerate(words) if w == "=" and i + 1 < len(words) and _NUMBER.fullmatch(words[i + 1])]:
        first = i
        while first and (_NUMBER.fullmatch(words[first - 1]) or words[first - 1] in (*OPERATIONS, "(", ")")):
            first -= 1
        try:
            exact_value(" ".join(words[first:i]))
        except ValueError:
            continue
        found.append(Equation(first, i + 1, words[first - 1] if first else ""))
    return found


def _steps(words: list[str]) -> list[Equation]:
    """The equations of a thought but for a doubting one's check, which makes no number of its own."""
    return [e for e in equations(words) if e.opening != PLAIN_WORDS["<doubt>"]]


def implied(words: list[str]) -> str:
    """Return the answer that a thought leads to: its last number, or "" if it has no equation."""
    return next((w for w in reversed(words) if _NUMBER.fullmatch(w)), "") if equations(words) else ""


def altered(words: list[str], rng, known=lambda number: True) -> list[str] | None:
    """Return the thought with one step's result changed by 1 to 9, and with all that follows from it recomputed.

    The numpy generator ``rng`` picks step and change. ``known`` says which numbers the model's tokenizer can spell.
    None where no such change leads to another answer that is a whole number from 0 on.
    """
    changes = [(e, sign * size) for e in _steps(words) for size in range(1, 10) for sign in (1, -1)]
    for choice in rng.permutation(len(changes)):
        step, change = changes[choice]
        made = _recomputed(words, step, change)
        if made and implied(made) != implied(words) and all(known(w) for w in made if _NUMBER.fullmatch(w)):
            return made
    return None


def _recomputed(words: list[str], step: Equation, change: int) -> list[str] | None:
    """Change one result and carry it through: as operand, into the results after it, and where it is said again."""
    made, moved, results = list(words), {}, {e.result: e for e in equations(words)}
    for at in range(step.result, len(words)):
        number = words[at]
        if at == step.result:
            value = Fraction(number) + change
        elif at in results:
            value = exact_value(" ".join(made[results[at].first : at - 1]))
        else:
            made[at] = moved.get(number, number)
            continue
        if value < 0 or value.denominator != 1 or not _NUMBER.fullmatch(number):
            return None
        made[at] = str(value)
        if made[at] != number:
            moved[number] = made[at]
    return made


def commuted(words: list[str]) -> list[str]:
    """Return the thought with the two operands of each sum and product in the other order."""
    made = list(words)
    for e in equations(words):
        if e.result - e.first == 4 and words[e.first + 1] in "+*":
            made[e.first], made[e.first + 2] = words[e.first + 2], words[e.first]
    return made


def reworded(words: list[str]) -> list[str]:
    """Return the same sums in the words of another strategy: plain steps, or an expert's if the steps were plain."""
    if not (steps := _steps(words)):
        return list(words)
    other = "expert" if strategy_of(" ".join(words)) == "cot" else "cot"
    return body(other, [" ".join(words[e.first : e.result + 1]) for e in steps]).split()


def in_letters(words: list[str]) -> list[str]:
    """Return the thought with each number spelt out, "seventeen" for 17, but for the answer, which stays to be read."""
    answer = implied(words)
    return [num2words(w) if _NUMBER.fullmatch(w) and w != answer else w for w in words]


def masked(words: list[str]) -> list[str]:
    """Return the thought with its last number hidden, from where a step first makes it on."""
    last = implied(words)
    first = next((e.result for e in equations(words) if words[e.result] == last), len(words))
    return [HIDDEN if w == last and i >= first else w for i, w in enumerate(words)]


def needed(words: list[str]) -> tuple[list[str], float]:
    """Return the thought without the steps that its last number does not depend on, and the share of words they leave.

    The last step is needed, and so is the nearest earlier step that makes an operand of a needed one. The share counts
    from the first step on. What a doubting thought checks belongs to it.
    """
    if not (steps := _steps(words)):
        return list(words), 0.0
    wanted, idle = {words[steps[-1].result]}, set()
    for e in reversed(steps):
        if words[e.result] in wanted:
            wanted = wanted - {words[e.result]} | set(words[e.first : e.result - 1])
        else:
            idle |= {*range(e.first - (e.opening in PLAIN_WORDS.values()), e.result + 1)}
    return [w for i, w in enumerate(words) if i not in idle], 1 - len(idle) / (len(words) - steps[0].first + 1)


def fault(words: list[str], steps: list[str]) -> str:
    """Return what is wrong first in a thought, read beside the worked ``steps``, or "" where its answer is theirs.

    That is its "arithmetic", the "numbers" it reckons with, the "operation", or the "steps", too few or too many.
    """
    if implied(words) == result(steps[-1]):
        return ""
    for e, true in zip(_steps(words), steps):
        said = " ".join(words[e.first : e.result + 1])
        if not holds(said):
            return "arithmetic"
        if result(said) != result(true):
            return "operation" if sorted(operands(said)) == sorted(operands(true)) else "numbers"
    return "steps"
