"""Thoughts without sharing: every thought as its own row of text, for models whose attention cannot be taken over.

Slower (each step reads the whole text again) but exact for any causal LM, because padding behind a row cannot
change what comes before it. Same interface as the shared engine: `PlainSteps` for `StepPass`, `plain_states`
for one packed pass.
"""

import torch

from .attention import backbone

_ROWS = 32


def plain_rows(base, tokens):
    """Final hidden states (R, L, hidden) of rows of tokens (R, L) padded behind the text."""
    parts = [
        base(input_ids=tokens[i : i + _ROWS], use_cache=False).last_hidden_state
        for i in range(0, len(tokens), _ROWS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def spliced(ids, row, limit, own):
    """Rows (S, L + W) of text ids[row][:limit] directly followed by own tokens (S, W)."""
    column = torch.arange(ids.shape[1] + own.shape[1], device=ids.device)
    after = column - limit.unsqueeze(1)
    text = ids[row][:, column.clamp(max=ids.shape[1] - 1)]
    return torch.where(after < 0, text, own.gather(1, after.clamp(0, own.shape[1] - 1)))


class PlainSteps:
    """Next tokens of streams; ids (B, L): aligned texts; row, limit (S,): whose text, and how much of it."""

    def __init__(self, ids, row, limit, length):
        self.ids, self.row, self.limit = ids, row, limit
        self.own = ids.new_zeros(len(row), length)
        self.done = 0

    def forward(self, base, tokens, places, width):
        """Hidden states (S * width, hidden) of the next `width` tokens of each stream."""
        self.own[:, self.done : self.done + width] = tokens.view(-1, width)
        self.done += width
        ids = self.ids[:, : int(self.limit.max())]
        states = plain_rows(base, spliced(ids, self.row, self.limit, self.own[:, : self.done]))
        column = self.limit.unsqueeze(1) + torch.arange(self.done - width, self.done, device=ids.device)
        return states[torch.arange(len(states), device=ids.device).unsqueeze(1), column].flatten(0, 1)

    def select(self, streams, row, limit):
        """Keeps (or repeats) the streams in the index tensor; row and limit are theirs."""
        self.own, self.row, self.limit = self.own[streams], row, limit


def plain_states(model, text, text_real, row, limit, own, own_real):
    """Flat states of all texts (R, L), then of all own tokens (S, W), where real; as one packed pass gives them."""
    base = backbone(model)
    states = plain_rows(base, spliced(text, row, limit, own))
    column = (limit.unsqueeze(1) + torch.arange(own.shape[1], device=own.device)).unsqueeze(-1)
    own_states = states.gather(1, column.expand(-1, -1, states.shape[-1]))
    return torch.cat([plain_rows(base, text)[text_real], own_states[own_real]])
