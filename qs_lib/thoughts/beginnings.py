"""States of texts in which a beginning that many have in common, as a prompt with worked examples, is read once."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .attention import backbone
from .fallback import padded_states
from .prefix import Packed
from .rescore import flat_states


def row_states(model, rows: list[list[int]], positions: list[list[int]]) -> torch.Tensor:
    """Return the final states (tokens, hidden) at ``positions`` of each row of ids, one row after the other.

    Common beginnings are read once where that halves the tokens that are read. Gradients are exact either way.
    """
    begun, total = beginnings(rows), sum(map(len, rows))
    row, column = torch.tensor([(k, at) for k, places in enumerate(positions) for at in places]).T
    saved = sum((len(own) - 1) * shared for shared, own in begun)
    watched = model.config._attn_implementation == "max_logits"  # by qk_clip, which shared attention does not call
    if 2 * saved < total or watched or min(map(len, rows)) < 2:  # a beginning has a token, and so has what follows it
        return padded_states(backbone(model), *_padded(rows, model.device))[row, column]
    order, line, limit = torch.tensor([(k, g, shared) for g, (shared, own) in enumerate(begun) for k in own]).T
    text = _padded([rows[own[0]][:shared] for shared, own in begun], model.device)
    rest = _padded([rows[k][shared:] for shared, own in begun for k in own], model.device)
    states = flat_states(model, Packed(*text, line.to(model.device), limit.to(model.device), *rest))
    sizes = [real.sum(1).cpu() for _, real in (text, rest)]
    begin, after = (size.cumsum(0) - size for size in sizes)
    place = order.argsort()[row]  # of each position's row among the own parts
    start = torch.where(column < limit[place], begin[line[place]], sizes[0].sum() + after[place] - limit[place])
    return states[start + column]


def beginnings(rows: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Group rows that agree in over half of their tokens: how many first tokens (never all) they share, and which."""
    found, first = [], []
    for k in sorted(range(len(rows)), key=rows.__getitem__):
        pairs = enumerate(zip(first, rows[k][:-1]))
        same = next((i for i, (a, b) in pairs if a != b), min(len(first), len(rows[k]) - 1))
        if 2 * same > len(rows[k]):
            first = first[:same]
            found[-1] = same, [*found[-1][1], k]
        else:
            first = rows[k][:-1]
            found.append((len(first), [k]))
    return found


def _padded(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows as ids (rows, longest), filled up behind, and which of these are real."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
