"""One step of all running thoughts: their next token attends to the shared text and to their own tokens."""

import torch

from .attention import forward
from .prefix import Grid

_TILE = 256
_FEW_NUMBERS = 100_000


class StepPass:
    """One more token (or the last two) for every stream: attends to its prefix and to its own earlier tokens.

    Streams lie flat as one sequence of S * W tokens. keys: prefix (key, value) per layer; row, limit (S,): prefix
    row of each stream and how many of its tokens it sees, sorted by row; length: T.
    """

    def __init__(self, keys, row, limit, length):
        self.keys, self.grid, self.length = keys, Grid(row, limit, limit, _TILE), length
        self.row, self.limit = row, limit
        self.own = [None] * len(keys)
        self.done = 0

    def take_first(self):
        """Takes the first own token from the prefix keys, where it was read right behind each stream's text."""
        for number, pair in enumerate(self.keys):
            first = torch.stack([x[self.row, :, self.limit] for x in pair])
            self.own[number] = first.new_empty(2, self.length, *first.shape[1:])
            self.own[number][:, 0] = first
        self.done = 1

    def start(self):
        self.number = 0

    def layer(self, query, key, value, rule):
        prefix_key, prefix_value = self.keys[self.number]
        query = query[0].transpose(0, 1)
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
        width, streams = self.width, len(query) // self.width
        if self.own[self.number] is None:
            self.own[self.number] = key.new_empty(2, self.length, streams, *key.shape[1:])
        own = self.own[self.number]
        self.number += 1
        if width == 1:
            own[0, self.done], own[1, self.done] = key, value
            output, lse = self.grid.attend(query, prefix_key, prefix_value, rule, self.done)
            return self._own(query, own[:, : self.done + 1], output, lse, rule).unsqueeze(0)
        own[0, self.done : self.done + width] = key.unflatten(0, (streams, width)).transpose(0, 1)
        own[1, self.done : self.done + width] = value.unflatten(0, (streams, width)).transpose(0, 1)
        outputs = []
        for shift, part in enumerate(query.unflatten(0, (streams, width)).unbind(1), self.done):
            output, lse = self.grid.attend(part, prefix_key, prefix_value, rule, shift)
            outputs.append(self._own(part, own[:, : shift + 1], output, lse, rule))
        return torch.stack(outputs, 1).flatten(0, 1).unsqueeze(0)

    @staticmethod
    def _own(query, own, output, lse, rule):
        # The prefix enters as one more key: its score is the LSE, its value the prefix output.
        if rule.window is not None:
            own = own[:, -rule.window :]
        key, value = own
        groups = (key.shape[2], query.shape[1] // key.shape[2])
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = lse.new_empty(len(key) + 1 + (rule.sinks is not None), len(query), *groups)
        inner = torch.linalg.vecdot((query * rule.scale).unflatten(1, groups), key.unsqueeze(3))
        if rule.softcap is not None:
            inner = rule.softcap * torch.tanh(inner / rule.softcap)
        scores[0] = lse.unflatten(1, groups)
        scores[1 : len(key) + 1] = inner
        if rule.sinks is not None:
            scores[-1] = rule.sinks.view(groups)
        weights = scores.softmax(0).unsqueeze(-1).to(wide)
        result = output.to(wide).unflatten(1, groups) * weights[0]
        if value.numel() < _FEW_NUMBERS:
            result += (weights[1 : len(key) + 1] * value.unsqueeze(3)).sum(0)
        else:
            for weight, part in zip(weights[1:], value.unsqueeze(3)):
                result.addcmul_(weight, part.to(wide))
        return result.flatten(1, 2).to(query.dtype)

    def forward(self, base, tokens, places, width):
        """Hidden states (S * width, hidden) of the next `width` tokens of each stream."""
        self.width = width
        hidden = forward(base, tokens.unsqueeze(0), places.unsqueeze(0), self)[0]
        self.done += width
        return hidden

    def select(self, streams, row, limit):
        """Keeps (or repeats) the streams in the index tensor; row and limit are theirs."""
        self.grid = Grid(row, limit, limit, _TILE)
        for number, own in enumerate(self.own):
            kept = own.new_empty(2, self.length, len(streams), *own.shape[3:])
            kept[:, : self.done] = own[:, : self.done].index_select(2, streams)
            self.own[number] = kept
