"""Before and after: a model's accuracy with and without thoughts, measured by the same procedure each time."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from .baking import habits
from .data.strategies import reply, strategy_of
from .data.tokens import encode, thinking_ids
from .evaluate import accuracy_with_thoughts, answer_of, best_temperature, replies
from .stats import interval

TEMPERATURES = (0.0, 0.5, 0.7, 1.0)


@dataclass
class Performance:
    """Exact match on test problems, arrays of 0 and 1, one row per problem.

    ``mixed``: ``num_thoughts`` thoughts answer together at ``temperature`` (the best on validation; all of them in
    ``by_temperature``); ``single`` (problems, K): each of these thoughts answers alone; ``greedy``: one greedy thought;
    ``without``: no thought, thinking tokens forbidden. ``thoughts``: decoded, per problem; ``thought_fit``: share of
    them whose strategy suits the problem; ``habits``: of the model's own free greedy replies.
    """

    temperature: float
    by_temperature: dict[float, float]
    mixed: np.ndarray
    single: np.ndarray
    greedy: np.ndarray
    without: np.ndarray
    thoughts: list[list[str]] = field(repr=False)
    thought_fit: float
    habits: dict[str, float]

    def share(self, name: str) -> tuple[float, float, float]:
        """Accuracy of ``mixed``, ``single``, ``greedy`` or ``without`` with its 95 % interval over problems."""
        return interval(getattr(self, name))


def read_problems(path: str | Path) -> list[dict]:
    """Records of a parquet file that notebook 02 wrote."""
    return pq.read_table(path).to_pylist()


def longest_answer(tokenizer, problems: list[dict]) -> int:
    """Tokens to allow for an answer: those of the longest true one, and its closing stop."""
    sequences = (encode(tokenizer, p["question"], reply(None, p)) for p in problems)
    return max(len(s.ids) - s.start for s in sequences)


def measure(model, tokenizer, validation: list[dict], test: list[dict], weights: str, num_thoughts: int = 4,
            thought_length: int = 28, seed: int = 0, temperatures=TEMPERATURES, max_new_tokens: int = 48) -> Performance:  # fmt: skip
    """Performance of a :class:`QuietStarForCausalLM` on ``test``; the temperature is chosen on ``validation``.

    ``weights``: ``"head"``, or ``"thoughts"`` for a model whose mixing head is untrained (every thought votes alike).
    ``max_new_tokens`` bounds the free replies that ``habits`` reads.
    """
    settings = {"num_thoughts": num_thoughts, "thought_length": thought_length, "weights": weights, "seed": seed,
                "max_new_tokens": longest_answer(tokenizer, [*validation, *test])}  # fmt: skip
    chosen = best_temperature(model, tokenizer, validation, temperatures, **settings)
    drawn = accuracy_with_thoughts(model, tokenizer, test, temperature=chosen["temperature"], single=True, **settings)
    one = settings | {"num_thoughts": 1, "weights": "thoughts"}
    greedy = accuracy_with_thoughts(model, tokenizer, test, temperature=0.0, **one)["mixed"]
    fits = [strategy_of(t) in (p["fits"] or ["cot"]) for ts, p in zip(drawn["thoughts"], test, strict=True) for t in ts]
    return Performance(
        chosen["temperature"], chosen["by_temperature"], drawn["mixed"].numpy(), drawn["each"].numpy(), greedy.numpy(),
        direct_accuracy(model.lm, tokenizer, test), drawn["thoughts"], float(np.mean(fits)),
        habits(model.lm, tokenizer, test, max_new_tokens),
    )  # fmt: skip


def direct_accuracy(lm, tokenizer, problems: list[dict]) -> np.ndarray:
    """Exact match (0 or 1 per problem) of greedy answers without a thought: the thinking tokens are forbidden."""
    cap, tags = longest_answer(tokenizer, problems), tuple(thinking_ids(tokenizer))
    written = replies(lm, tokenizer, [p["question"] for p in problems], cap, tags, desc="direct")
    return np.array([answer_of(tokenizer, w) == p["answer"] for w, p in zip(written, problems, strict=True)], float)
