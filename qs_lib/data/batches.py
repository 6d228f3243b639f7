"""Which problems come when, as token batches, and where and for how long the model thinks in them."""

import math
import random

import torch

from ..errors import WorkbookError, at_least
from . import Problem
from .strategies import reply
from .tokens import encode, padded


def answer_batch(tokenizer, problems: list[Problem], device=None):
    """Return questions with their answers and the positions ``(batch, 1)`` of the last question tokens.

    The model thinks after them. Ids and mask ``(batch, length)`` are padded on the right.
    """
    sequences = [encode(tokenizer, p["question"], reply(None, p)) for p in problems]
    ids, mask = padded(tokenizer, [s.ids for s in sequences], device)
    return ids, mask, torch.tensor([[s.start - 1] for s in sequences], device=device)


def text_of(problem: Problem) -> tuple[str, str]:
    """Return a whole text: a question and its worked solution, or its answer where none is known, or a whole story."""
    if "story" in problem:
        return problem["question"], problem["story"]
    return problem["question"], reply("cot" if problem["steps"] else None, problem)


@torch.no_grad()
def think_where(lm, tokenizer, problems: list[Problem], where: str = "question", count: int = 8, generator=None):
    """Return a batch, ids and mask ``(batch, length)``, and the positions to think at, ``(batch, P)`` or None for all.

    ``where``: after the ``question`` of an answered problem, or in whole texts, cut at the tokenizer's greatest length,
    at ``every`` token or at ``count`` of them. ``random`` ones, drawn from ``generator``, stand for every token at a
    chosen price. ``difficult`` ones have the next token that the model itself finds least likely. ``uncertain`` ones
    have its prediction of highest entropy, which needs no truth. Raises ``WorkbookError`` for another place.
    """
    if where == "question":
        return answer_batch(tokenizer, problems, lm.device)
    rows = [encode(tokenizer, *text_of(p)).ids[: tokenizer.model_max_length] for p in problems]
    ids, mask = padded(tokenizer, rows, lm.device)
    if where == "every":
        return ids, mask, None
    if where == "random":
        drawn = torch.rand(mask[:, 1:].shape, generator=generator)  # on the CPU: the same on every device
        return ids, mask, highest(drawn.to(mask.device), mask, count)
    if (by := {"difficult": "log_prob", "uncertain": "entropy"}.get(where)) is None:
        raise WorkbookError(f"think at {where!r}: it must be 'question', 'difficult', 'uncertain', 'random' or 'every'")
    return ids, mask, difficult_positions(lm(input_ids=ids, attention_mask=mask).logits, ids, mask, count, by=by)


def disagreement(thoughts) -> torch.Tensor:
    """Count the different last tokens before ``</think>`` at a row's most disputed place, (batch,). No label is read."""
    last = (thoughts.lengths - 2).clamp_min(0).unsqueeze(-1)
    found = thoughts.tokens.gather(-1, last).squeeze(-1).tolist()
    return torch.tensor([max(len(set(place)) for place in row) for row in found])


def curriculum(
    problems: list[Problem], progress: float, rng: random.Random, size: int, hardest_share: float = 0.4
) -> list[Problem]:
    """Draw ``size`` problems from the easier ones first: all difficulties are reached at a ``progress`` of 0.1 (of 1).

    ``hardest_share`` of them have the highest difficulty reached, the others any.
    """
    levels = sorted({p["difficulty"] for p in problems})
    reached = levels[: max(1, math.ceil(min(1.0, 10 * progress + 1e-9) * len(levels)))]
    by_level = {level: [p for p in problems if p["difficulty"] == level] for level in reached}
    hard = round(size * hardest_share)
    picked = [rng.choice(by_level[reached[-1]]) for _ in range(hard)]
    return picked + [rng.choice(by_level[rng.choice(reached)]) for _ in range(size - hard)]


def difficult_positions(logits, input_ids, attention_mask=None, count: int = 8, by: str = "entropy"):
    """Return the ``count`` positions ``(batch, count)``, in text order, where the next token is hardest to predict.

    ``logits (batch, length, vocab)`` come from a forward pass without thoughts, ``input_ids (batch, length)`` are its
    tokens. ``by``: ``"entropy"`` of the prediction needs no label and serves at inference, ``"log_prob"`` of the true
    next token serves in training. Rows with fewer positions that a true token follows are filled with -1.
    Raises ``ValueError`` on another ``by``.
    """
    at_least(1, count=count)
    log_probs = logits[:, :-1].float().log_softmax(-1)
    if by == "entropy":
        hardness = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)  # (batch, length - 1)
    elif by == "log_prob":
        hardness = -log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    else:
        raise ValueError(f"by is {by!r}; it must be 'entropy' or 'log_prob'")
    return highest(hardness, torch.ones_like(input_ids) if attention_mask is None else attention_mask, count)


def highest(values: torch.Tensor, mask: torch.Tensor, count: int) -> torch.LongTensor:
    """Return the places ``(batch, count)``, in order, of a row's highest values whose token is read and followed."""
    values = values.masked_fill(~(mask[:, :-1].bool() & mask[:, 1:].bool()), -torch.inf)
    best, past = values.topk(min(count, values.shape[1]), dim=1), values.shape[1]
    places = best.indices.masked_fill(best.values == -torch.inf, past).sort(1).values
    return torch.nn.functional.pad(places.masked_fill(places == past, -1), (0, count - places.shape[1]), value=-1)


def thought_length(problem_length: int) -> int:
    """Return the tokens that a problem of ``problem_length`` tokens deserves: a fifth, from 10 to 20."""
    at_least(1, problem_length=problem_length)
    return max(10, min(20, problem_length // 5))
