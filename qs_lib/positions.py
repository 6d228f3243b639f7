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
        readable = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
        hardness = hardness.masked_fill(~readable, -torch.inf)
    best = hardness.topk(min(count, hardness.shape[1]), dim=1)
    positions = best.indices.masked_fill(best.values == -torch.inf, input_ids.shape[1])
    positions = positions.sort(1).values
    positions = positions.masked_fill(positions == input_ids.shape[1], -1)
    return torch.nn.functional.pad(positions, (0, count - positions.shape[1]), value=-1)


def thought_length(problem_length: int, shortest: int = 10, longest: int = 20) -> int:
    """Tokens a problem of ``problem_length`` tokens deserves: min(20, length // 5), at least 10."""
    return max(shortest, min(longest, problem_length // 5))
