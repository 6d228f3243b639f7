"""Where to think, and for how long."""

import torch


def difficult_positions(logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                        count: int = 8, by: str = "entropy") -> torch.LongTensor:
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


def random_positions(attention_mask: torch.Tensor, count: int = 8, generator: torch.Generator | None = None) -> torch.LongTensor:
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
