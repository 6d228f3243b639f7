"""Which problems come when, as token batches, and where and for how long the model thinks in them."""

import math
import random

import torch

from ..errors import WorkbookError
from .strategies import reply
from .tokens import encode, pad


def answer_batch(tokenizer, problems: list[dict], device=None):
    """Questions with their answers, right-padded: input_ids and attention_mask (B, L), and positions (B, 1) of the
    last question token, after which the model thinks."""
    sequences = [encode(tokenizer, p["question"], reply(None, p)) for p in problems]
    ids = pad([s.ids for s in sequences], tokenizer.pad_token_id, device=device)
    mask = pad([[1] * len(s.ids) for s in sequences], 0, device=device)
    return ids, mask, torch.tensor([[s.start - 1] for s in sequences], device=device)


def text_of(problem: dict) -> tuple[str, str]:
    """A whole text: a question and its worked solution in plain words, or its answer where no work is known."""
    return problem["question"], reply("cot" if problem["steps"] else None, problem)


def text_batch(tokenizer, problems: list[dict], device=None):
    """Whole texts, cut at the tokenizer's greatest length: input_ids and attention_mask (B, L), right-padded."""
    ids = [encode(tokenizer, *text_of(p)).ids for p in problems]
    ids = [row[: tokenizer.model_max_length] for row in ids]
    return pad(ids, tokenizer.pad_token_id, device=device), pad([[1] * len(row) for row in ids], 0, device=device)


@torch.no_grad()
def think_where(lm, tokenizer, problems: list[dict], where: str = "question", count: int = 8, generator=None):
    """A batch and the positions (B, P) to think at: input_ids and attention_mask (B, L), positions or None for all.

    ``where``: after the ``question`` of an answered problem; in whole texts at ``every`` token, or at ``count`` of them: ``random``
    ones (drawn from ``generator``), which stand for every token at a price that can be chosen, ``difficult`` ones, whose next token
    the model itself finds least likely, or ``uncertain`` ones, where its prediction has the highest entropy, which needs no truth. Raises ``WorkbookError`` for another place.
    """
    if where == "question":
        return answer_batch(tokenizer, problems, lm.device)
    ids, mask = text_batch(tokenizer, problems, lm.device)
    if where == "every":
        return ids, mask, None
    if where == "random":
        return ids, mask, random_positions(mask, count, generator)
    by = {"difficult": "log_prob", "uncertain": "entropy"}.get(where)
    if by is None:
        raise WorkbookError(f"think at {where!r}: it must be 'question', 'difficult', 'uncertain', 'random' or 'every'")
    return ids, mask, difficult_positions(lm(input_ids=ids, attention_mask=mask).logits, ids, mask, count, by=by)


def disagreement(thoughts) -> torch.Tensor:
    """Label-free difficulty of each row: number of different last tokens before </think> among its thoughts, (B,)."""
    last = (thoughts.lengths - 2).clamp_min(0).unsqueeze(-1)
    ends = thoughts.tokens.gather(-1, last).flatten(1)
    return torch.tensor([len(set(row)) for row in ends.tolist()])


def curriculum(problems: list[dict], progress: float, rng: random.Random, size: int, hard_share: float = 0.4):
    """``size`` problems, easy to hard: up to the difficulty that ``progress`` (0..1) has reached, all from a tenth on,
    ``hard_share`` of them of the highest difficulty reached."""
    levels = sorted({p["difficulty"] for p in problems})
    reached = levels[: max(1, math.ceil(min(1.0, 10 * progress + 1e-9) * len(levels)))]
    by_level = {level: [p for p in problems if p["difficulty"] == level] for level in reached}
    hard = round(size * hard_share)
    picked = [rng.choice(by_level[reached[-1]]) for _ in range(hard)]
    return picked + [rng.choice(by_level[rng.choice(reached)]) for _ in range(size - hard)]


def difficult_positions(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    count: int = 8,
    by: str = "entropy",
) -> torch.LongTensor:
    """The ``count`` positions (batch, count), in text order, where the next token is hardest for the plain model.

    ``logits`` (batch, L, vocab) of a plain forward pass. ``by``: ``"entropy"`` of the prediction (no label: usable at
    inference) or ``"log_prob"`` of the true next token (training only). Rows with fewer than ``count`` predictable
    positions are filled with -1. Raises ``ValueError`` on another ``by``.
    """
    log_probs = logits[:, :-1].float().log_softmax(-1)
    if by == "entropy":
        hardness = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
    elif by == "log_prob":
        hardness = -log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    else:
        raise ValueError(f"by is {by!r}; it must be 'entropy' or 'log_prob'")
    if attention_mask is not None:
        hardness = hardness.masked_fill(~followed(attention_mask), -torch.inf)
    return highest(hardness, count)


def random_positions(
    attention_mask: torch.Tensor, count: int = 8, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """``count`` positions (batch, count), in text order, drawn without replacement among those that a true token follows; rows
    with fewer are filled with -1. ``generator`` is one of the CPU: the draw is the same on every device."""
    drawn = torch.rand(attention_mask[:, 1:].shape, generator=generator).to(attention_mask.device)
    return highest(drawn.masked_fill(~followed(attention_mask), -torch.inf), count)


def followed(attention_mask: torch.Tensor) -> torch.Tensor:
    """Which tokens but the last are read and have a true token after them, (batch, L - 1)."""
    return attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()


def highest(values: torch.Tensor, count: int) -> torch.LongTensor:
    """Places of the ``count`` highest values of each row, in order, then -1 for what is -inf or not there: (batch, count)."""
    best, past = values.topk(min(count, values.shape[1]), dim=1), values.shape[1]
    places = best.indices.masked_fill(best.values == -torch.inf, past).sort(1).values
    return torch.nn.functional.pad(places.masked_fill(places == past, -1), (0, count - places.shape[1]), value=-1)


def thought_length(problem_length: int, shortest: int = 10, longest: int = 20) -> int:
    """Tokens a problem of ``problem_length`` tokens deserves: min(20, length // 5), at least 10."""
    return max(shortest, min(longest, problem_length // 5))
