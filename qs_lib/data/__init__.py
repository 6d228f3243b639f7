"""Thinking tokens, problems, worked examples, and the batches that training reads."""

from typing import TypedDict


class Problem(TypedDict):
    """A word problem with its answer, from any source."""

    question: str
    answer: str  # a number as text
    steps: list[str]  # worked equations such as "8 + 5 = 13", none where they are not known to be right
    difficulty: int  # number of worked steps
    family: str
    fits: list[str]  # strategies that suit it
    lead: list[str]  # numbers that a strategy names first, such as the claim to refute
