"""Attention of many thoughts to one shared copy of the text before them.

Three passes use it. ``PrefixPass`` reads the texts and keeps their keys. ``StepPass`` adds the next token to every
running thought. ``PackedPass`` reads texts, thoughts and true tokens at once, differentiably and without padding.
"""

from typing import NamedTuple

import torch

from .attention import add_sinks, attend, attend_grads, causal_attend, causal_attend_grads, forward, key_mask, merge

_KEPT_NUMBERS = 4_000_000
_STEP_TILE = 256
_FEW_NUMBERS = 100_000
_PACKED_TILE = 1024


class Rows(NamedTuple):
    """A batch whose padding was moved behind the text, and where thoughts go in it.

    A unit is a position with thoughts. Units are sorted by row, then position.
    ``ids`` (B, L): tokens, text first. ``lengths`` (B,): text tokens per row. ``row``, ``position`` (U,): row of each
    unit, and index in it of the token it follows. ``slot`` (U,): its place in the caller's ``positions`` (B, P), flat.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    slot: torch.Tensor
    positions: torch.Tensor


def align_rows(device, input_ids, attention_mask, positions):
    """Move padding behind the text, sort positions, return ``Rows``. Raises ``ValueError`` if shapes or places misfit."""
    input_ids = input_ids.to(device, torch.long)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (batch, length), not {tuple(input_ids.shape)}.")
    batch, length = input_ids.shape
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
    if real.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(real.shape)} but input_ids {tuple(input_ids.shape)}.")
    real = real.to(torch.bool)
    if positions is None:
        positions = torch.arange(length, device=device).expand(batch, length).masked_fill(~real, -1)
    else:
        positions = positions.to(device)
        if positions.dim() != 2 or len(positions) != batch or positions.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"positions must be LongTensor ({batch}, P), not {positions.type()} {[*positions.shape]}.")
        if positions.numel() and (positions.min() < -1 or positions.max() >= length):
            raise ValueError(f"positions must be -1 (none) or token indices below {length}.")
        if ((positions >= 0) & ~real.gather(1, positions.clamp(min=0))).any():
            raise ValueError("positions must not point at padding; use -1 for no thought.")
    ids = input_ids
    if (real[:, 1:] & ~real[:, :-1]).any():
        ids = input_ids.gather(1, (~real).to(torch.uint8).argsort(dim=1, stable=True))
    index = (real.cumsum(1) - 1).gather(1, positions.clamp(min=0)).masked_fill(positions < 0, length)
    order = index.argsort(dim=1, stable=True)
    index = index.gather(1, order)
    row, place = (index < length).nonzero(as_tuple=True)
    slot = row * positions.shape[1] + order[row, place]
    return Rows(ids, real.sum(1), row, index[row, place], slot, positions)


class Pad:
    """Ragged sequences of ``lengths`` (R,) that lie flat one after the other, as one rectangle (R, L) and back."""

    def __init__(self, lengths):
        self.shape = (len(lengths), int(lengths.max()))
        self.size = int(lengths.sum())
        column = torch.arange(self.shape[1], device=lengths.device)
        real = column < lengths.unsqueeze(1)
        self.real = None if bool(real.all()) else real.flatten().nonzero().squeeze(1)
        start = lengths.cumsum(0) - lengths
        self.source = torch.where(real, start.unsqueeze(1) + column, self.size).flatten()

    def gather(self, x):
        """Return flat x (size, H, ...) as (R, H, L, ...), zeros behind each sequence."""
        if self.real is not None:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.source)
        return x.unflatten(0, self.shape).transpose(1, 2)

    def flat(self, x):
        """Return x (R, H, L, ...) as flat (size, H, ...)."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.real is None else x.index_select(0, self.real)


class Grid:
    """Queries of many streams as one rectangle (R, Q), a line per prefix row, cut into tiles along Q.

    ``row``, ``limit``, ``place`` (size,): prefix row, number of prefix keys seen and position of each query, sorted by
    row. A tile reads the prefix keys, never copied per thought, up to its own largest limit: its mask is small.
    """

    def __init__(self, row, limit, place, tile):
        first = int(row[0])
        self.pad = Pad(torch.bincount(row)[first:])
        self.rows = slice(first, first + self.pad.shape[0])
        self.limit, self.place = self._line(limit), self._line(place)
        limits, places = (bool((x == x[:1]).all()) for x in (self.limit, self.place))
        self.alike = limits, limits and places  # whether one mask serves all lines: without a window, and with one
        self.tiles = []
        for start in range(0, self.pad.shape[1], tile):
            limits = self.limit[:, start : start + tile]
            self.tiles.append((slice(start, start + tile), int(limits.max()), bool((limits == limits.max()).all())))
        self.masks, self.kept = {}, 0

    def _line(self, x):
        # An empty cell repeats the last query before it (an empty line the largest), so that masks stay small.
        if self.pad.real is None:
            return x.view(self.pad.shape)
        line = torch.cat([x, x.new_full((1,), -1)])[self.pad.source].view(self.pad.shape)
        last = line.cummax(1).values
        return torch.where(line < 0, torch.where(last < 0, x.max(), last), line)

    def _tile(self, number, window, shift, dtype):
        """Return first and last key of a tile, its mask, and its queries that see no key (None where not needed)."""
        # Masks serve all layers of a pass, and all steps unless a window moves with the step. When they are many
        # they are made anew each time: kept memory must not grow with the square of the text.
        key = (number, window)
        if key in self.masks and (window is None or self.masks[key][0] == shift):
            return self.masks[key][1]
        columns, last, same = self.tiles[number]
        place, first = self.place[:, columns] + shift, 0
        if window is not None:
            first = min(max(0, int(place.min()) - window + 1), last - 1)
            window = None if int(place.max()) < window else window
        if window is None and same:
            made = 0, last, None, None
        else:
            lines = slice(0, 1 if self.alike[window is not None] else None)
            made = first, last, *key_mask(self.limit[lines, columns], place[lines], window, first, last, dtype)
        size = made[2].numel() if made[2] is not None else 0
        if key in self.masks or self.kept + size <= _KEPT_NUMBERS:
            self.kept += 0 if key in self.masks else size
            self.masks[key] = shift, made
        return made

    def attend(self, query, key, value, rule, shift=0):
        """Return attention of flat queries (size, H, D) to prefix key, value (B, Hkv, L, D): flat output and LSE.

        ``shift`` is added to every query's position when streams have moved on since the grid was made.
        """
        query, parts = self.pad.gather(query), []
        for number, (columns, _, _) in enumerate(self.tiles):
            first, last, mask, blind = self._tile(number, rule.window, shift, query.dtype)
            seen = (self.rows, slice(None), slice(first, last))
            output, lse = attend(query[:, :, columns], key[seen], value[seen], rule, mask)
            if blind is not None:
                output, lse = output.masked_fill(blind.unsqueeze(-1), 0), lse.masked_fill(blind, -torch.inf)
            parts.append((output, lse))
        output, lse = parts[0] if len(parts) == 1 else (torch.cat(part, 2) for part in zip(*parts))
        return self.pad.flat(output), self.pad.flat(lse)

    def attend_grads(self, grad, query, key, value, output, lse, rule, grad_key, grad_value):
        """Return the flat query gradient. Prefix gradients are added to ``grad_key``, ``grad_value`` (B, Hkv, L, D)."""
        lines, parts = [self.pad.gather(x) for x in (grad, query, output, lse)], []
        for number, (columns, _, _) in enumerate(self.tiles):
            first, last, mask, _ = self._tile(number, rule.window, 0, query.dtype)
            seen = (self.rows, slice(None), slice(first, last))
            g, q, o, l = (x[:, :, columns] for x in lines)
            part = attend_grads(g, q, key[seen], value[seen], o, l, rule, mask)
            parts.append(part[0])
            grad_key[seen] += part[1]
            grad_value[seen] += part[2]
        return self.pad.flat(parts[0] if len(parts) == 1 else torch.cat(parts, 2))


class PrefixPass:
    """Plain causal attention over aligned rows, which keeps each layer's keys. Padding is last and needs no mask."""

    def __init__(self):
        self.keys, self.rules = [], []

    def layer(self, query, key, value, rule):
        self.keys.append((key.contiguous(), value.contiguous()))  # every step of every thought reads them
        self.rules.append(rule)
        output, lse = (x.transpose(1, 2) for x in causal_attend(query, key, value, rule))
        return output if rule.sinks is None else add_sinks(output, lse, rule.sinks)[0]


class StepPass:
    """The next token (or the last two) of every stream, which attends to its prefix and to its own earlier tokens.

    ``base``: the backbone. ``keys``: prefix (key, value) per layer. ``row``, ``limit`` (S,): prefix row of each stream
    and how many of its tokens it sees, sorted by row. ``length``: most tokens of a stream.
    """

    def __init__(self, base, keys, row, limit, length):
        self.base, self.keys, self.length = base, keys, length
        self.row, self.limit, self.grid = row, limit, Grid(row, limit, limit, _STEP_TILE)
        self.own = [None] * len(keys)  # keys and values of earlier tokens (2, length, S, Hkv, D) per layer
        self.done = 0

    def take_first(self):
        """Take the first own token from the prefix keys, where it was read right behind each stream's text."""
        for number, pair in enumerate(self.keys):
            first = torch.stack([x[self.row, :, self.limit] for x in pair])
            self.own[number] = first.new_empty(2, self.length, *first.shape[1:])
            self.own[number][:, 0] = first
        self.done = 1

    def forward(self, tokens):
        """Return hidden states (S, W, hidden) of the next tokens (S, W) of each stream."""
        self.width, self.number = tokens.shape[1], 0  # number: the next layer
        places = self.limit.unsqueeze(1) + torch.arange(self.done, self.done + self.width, device=tokens.device)
        hidden = forward(self.base, tokens.view(1, -1), places.view(1, -1), self)[0]
        self.done += self.width
        return hidden.unflatten(0, tokens.shape)

    def select(self, streams):
        """Keep (or repeat) the streams in the index tensor."""
        self.row, self.limit = self.row[streams], self.limit[streams]
        self.grid = Grid(self.row, self.limit, self.limit, _STEP_TILE)
        for number, own in enumerate(self.own):
            kept = own.new_empty(2, self.length, len(streams), *own.shape[3:])
            kept[:, : self.done] = own[:, : self.done].index_select(2, streams)
            self.own[number] = kept

    def layer(self, query, key, value, rule):
        # The streams lie flat as one sequence (1, H, S * W, D).
        query, key, value = (x[0].transpose(0, 1).unflatten(0, (-1, self.width)) for x in (query, key, value))
        if self.own[self.number] is None:
            self.own[self.number] = key.new_empty(2, self.length, len(key), *key.shape[2:])
        own, prefix = self.own[self.number], self.keys[self.number]
        self.number += 1
        stop = self.done + self.width
        own[0, self.done : stop], own[1, self.done : stop] = key.transpose(0, 1), value.transpose(0, 1)
        outputs = []
        for shift, part in enumerate(query.unbind(1), self.done):
            output, lse = self.grid.attend(part, *prefix, rule, shift)
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
        if value.is_cuda or value.numel() < _FEW_NUMBERS:  # a GPU waits for Python, not for numbers
            result += (weights[1 : len(key) + 1] * value.unsqueeze(3)).sum(0)
        else:
            for weight, part in zip(weights[1:], value.unsqueeze(3)):
                result.addcmul_(weight, part.to(wide))
        return result.flatten(1, 2).to(query.dtype)


class PackedPass(NamedTuple):
    """Attention over one packed sequence: all prefix rows, then all thoughts with their true tokens.

    ``text``, ``own``: ``Pad`` of the prefix rows and of the thoughts. ``grid``: thought tokens as queries of prefix rows.
    """

    text: Pad
    own: Pad
    grid: Grid

    def layer(self, query, key, value, rule):
        flat = (x[0].transpose(0, 1) for x in (query, key, value))  # (Q, H, D) and (Q, Hkv, D)
        return _PackedAttention.apply(*flat, rule.sinks, rule, self).unsqueeze(0)


class _PackedAttention(torch.autograd.Function):
    """Flat query (Q, H, D), key, value (Q, Hkv, D) to flat output. Each part's backward uses the merged LSE."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, rule, work):
        cut, grid = work.text.size, work.grid
        text = [work.text.gather(x[:cut]) for x in (query, key, value)]
        own = [work.own.gather(x[cut:]) for x in (query, key, value)]
        output, lse = (work.text.flat(x) for x in causal_attend(*text, rule))
        own_output, own_lse = (work.own.flat(x) for x in causal_attend(*own, rule))
        far_output, far_lse = grid.attend(query[cut:], text[1], text[2], rule)
        own_output, own_lse = merge(own_output, own_lse, far_output, far_lse)
        output, lse = torch.cat([output, own_output]), torch.cat([lse, own_lse])
        if sinks is not None:
            output, lse = add_sinks(output, lse, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.rule, ctx.work = rule, work
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, sinks, output, lse = ctx.saved_tensors
        work, rule = ctx.work, ctx.rule
        cut = work.text.size
        flat = (grad.contiguous(), query, key, value, output, lse)
        text = [work.text.gather(x[:cut]) for x in flat]
        own = [work.own.gather(x[cut:]) for x in flat]
        text_grads = causal_attend_grads(*text, rule)
        own_grads = [work.own.flat(x) for x in causal_attend_grads(*own, rule)]
        own_grads[0] = own_grads[0] + work.grid.attend_grads(
            grad[cut:], query[cut:], text[2], text[3], output[cut:], lse[cut:], rule, *text_grads[1:]
        )
        grads = [torch.cat([work.text.flat(a), b]) for a, b in zip(text_grads, own_grads)]
        grad_sinks = None
        if sinks is not None:
            share = (sinks.to(lse.dtype) - lse).exp()
            grad_sinks = -(share * (grad * output).sum(-1)).sum(0).to(sinks.dtype)
        return *grads, grad_sinks, None, None


class Packed(NamedTuple):
    """Texts, and the own sequences (thought and true tokens) that follow them.

    ``text``, ``text_real`` (R, L): tokens, and which are read. ``own``, ``own_real`` (S, W): the same of own sequences.
    ``row``, ``limit`` (S,): the text that each of them follows, sorted, and after how many of its tokens.
    """

    text: torch.Tensor
    text_real: torch.Tensor
    row: torch.Tensor
    limit: torch.Tensor
    own: torch.Tensor
    own_real: torch.Tensor

    def own_places(self):
        """Return the position (S, W) of each own token in its text."""
        return self.limit.unsqueeze(1) + torch.arange(self.own.shape[1], device=self.own.device)


def packed_states(base, packed):
    """Return the final states (flat, hidden) of all real text tokens, then all real own tokens, in one pass."""
    text_real, own_real = packed.text_real, packed.own_real
    lengths, own_places = own_real.sum(1), packed.own_places()[own_real]
    row, limit = packed.row.repeat_interleave(lengths), packed.limit.repeat_interleave(lengths)
    work = PackedPass(Pad(text_real.sum(1)), Pad(lengths), Grid(row, limit, own_places, _PACKED_TILE))
    ids = torch.cat([packed.text[text_real], packed.own[own_real]])
    return forward(base, ids.unsqueeze(0), torch.cat([text_real.nonzero()[:, 1], own_places]).unsqueeze(0), work)[0]
