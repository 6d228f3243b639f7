"""Attention of many thoughts to one shared copy of the text before them.

Three passes use it: `PrefixPass` reads the texts and keeps their keys, `StepPass` adds the next token to every running
thought, `PackedPass` reads texts, thoughts and look-ahead tokens at once, differentiably and without padding.
"""

from typing import NamedTuple

import torch

from .attention import (
    add_sinks,
    attend,
    attend_backward,
    backbone,
    causal_attend,
    causal_attend_backward,
    forward,
    merge,
    visibility,
)

_KEPT_NUMBERS = 4_000_000
_STEP_TILE = 256
_FEW_NUMBERS = 100_000
_PACKED_TILE = 1024


class Rows(NamedTuple):
    """A batch whose padding was moved behind the text, and where thoughts go in it.

    ids (B, L): tokens, text first. lengths (B,): text tokens per row. position (U,): index in `ids` rows of the
    token that each thought unit follows; row (U,): its row; slot (U,): its place in the flattened (B, P)
    positions. Units are sorted by row, then position. positions (B, P): as returned to the caller.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    slot: torch.Tensor
    positions: torch.Tensor


def align_rows(input_ids, attention_mask, positions):
    """Moves padding behind the text and sorts the thought positions; see Rows. Raises ValueError."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (batch, length), not {tuple(input_ids.shape)}.")
    batch, length = input_ids.shape
    if attention_mask is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}."
        )
    else:
        real = attention_mask.to(torch.bool)
    if positions is None:
        positions = torch.arange(length, device=input_ids.device).expand(batch, length)
        positions = positions.masked_fill(~real, -1)
    else:
        positions = positions.to(input_ids.device)
        if positions.dim() != 2 or len(positions) != batch or positions.is_floating_point():
            raise ValueError(f"positions must be a LongTensor ({batch}, P), not {tuple(positions.shape)}.")
        if positions.numel() and (positions.min() < -1 or positions.max() >= length):
            raise ValueError(f"positions must be -1 (none) or token indices below {length}.")
        if ((positions >= 0) & ~real.gather(1, positions.clamp(min=0))).any():
            raise ValueError("positions must not point at padding; use -1 for no thought.")
    lengths = real.sum(1)
    ids = input_ids
    if (real[:, 1:] & ~real[:, :-1]).any():
        ids = input_ids.gather(1, (~real).to(torch.uint8).argsort(dim=1, stable=True))
    index = (real.cumsum(1) - 1).gather(1, positions.clamp(min=0)).masked_fill(positions < 0, length)
    order = index.argsort(dim=1, stable=True)
    index = index.gather(1, order)
    row, place = (index < length).nonzero(as_tuple=True)
    slot = row * positions.shape[1] + order[row, place]
    return Rows(ids, lengths, row, index[row, place], slot, positions)


class Grid:
    """Queries of many streams laid out as one rectangle (R, Q), one line per prefix row, cut into tiles.

    row, limit, place: (Q_all,) prefix row, number of prefix keys seen and position of each query; sorted by row.
    Every tile of queries reads the prefix keys up to its own largest limit, so its mask is small, and keys are
    never copied per thought. first: the prefix row of the first line.
    """

    def __init__(self, row, limit, place, tile):
        count = torch.bincount(row)
        self.first = int(row[0])
        count = count[self.first :]
        self.shape = (len(count), int(count.max()))
        within = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row - self.first]
        cell = (row - self.first) * self.shape[1] + within
        size = self.shape[0] * self.shape[1]
        self.cell = None if size == len(row) else cell
        self.limit, self.place = (self._line(x, size, cell) for x in (limit, place))
        if self.cell is not None:
            self.source = torch.full((size,), len(row), device=row.device).scatter_(
                0, cell, torch.arange(len(row), device=row.device)
            )
        self.alike = bool((self.limit == self.limit[:1]).all())
        self.tiles = []
        for start in range(0, self.shape[1], tile):
            stop = min(start + tile, self.shape[1])
            limits = self.limit[:, start:stop]
            self.tiles.append((start, stop, int(limits.max()), bool((limits == limits.max()).all())))
        self.masks, self.kept = {}, 0

    def _line(self, x, size, cell):
        # An empty cell repeats the last query before it (an empty line the largest), so that masks stay small.
        if self.cell is None:
            return x.view(self.shape)
        line = x.new_full((size,), -1).scatter_(0, cell, x).view(self.shape)
        last = line.cummax(1).values
        return torch.where(line < 0, torch.where(last < 0, x.max(), last), line)

    def gather(self, x):
        """Flat queries (Q_all, H, ...) as (R, H, Q, ...); cells without a query hold zeros."""
        if self.cell is not None:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.source)
        return x.unflatten(0, self.shape).transpose(1, 2)

    def flat(self, x):
        """(R, Q, H, ...) back to flat queries."""
        x = x.flatten(0, 1)
        return x if self.cell is None else x.index_select(0, self.cell)

    def _tile(self, number, window, shift, dtype):
        # Masks serve all layers of a pass, and all steps unless a window moves with the step. When they are many
        # they are made anew each time: kept memory must not grow with the square of the text.
        key = (number, window)
        if key in self.masks and (window is None or self.masks[key][0] == shift):
            return self.masks[key][1]
        start, stop, last, same = self.tiles[number]
        place, first = self.place[:, start:stop] + shift, 0
        if window is not None:
            first = min(max(0, int(place.min()) - window + 1), last - 1)
            window = None if int(place.max()) < window else window
        if window is None and same:
            made = 0, last, None, None
        else:
            lines = slice(0, 1 if self.alike else None)
            made = first, last, *visibility(self.limit[lines, start:stop], place[lines], window, first, last, dtype)
        size = made[2].numel() if made[2] is not None else 0
        if key in self.masks or self.kept + size <= _KEPT_NUMBERS:
            self.kept += 0 if key in self.masks else size
            self.masks[key] = shift, made
        return made

    def attend(self, query, key, value, rule, shift=0):
        """Attention of flat queries (Q_all, H, D) to prefix key, value (B, Hkv, L, D): flat output and LSE.

        shift is added to every query's position, for streams that have moved on since the grid was made.
        """
        query = self.gather(query)
        rows = slice(self.first, self.first + self.shape[0])
        output = lse = None
        for number, (start, stop, _, _) in enumerate(self.tiles):
            first, last, mask, blind = self._tile(number, rule.window, shift, query.dtype)
            part, part_lse = attend(
                query[:, :, start:stop],
                key[rows, :, first:last],
                value[rows, :, first:last],
                rule.scale,
                mask,
                softcap=rule.softcap,
            )
            if blind is not None:
                part_lse = part_lse.masked_fill(blind, -torch.inf)
                part = part.masked_fill(blind.unsqueeze(-1), 0)
            if len(self.tiles) == 1:
                output, lse = part.transpose(1, 2), part_lse.transpose(1, 2)
                break
            if output is None:
                output = part.new_empty(*self.shape, *part.shape[1::2])
                lse = part_lse.new_empty(*self.shape, query.shape[1])
            output[:, start:stop] = part.transpose(1, 2)
            lse[:, start:stop] = part_lse.transpose(1, 2)
        return self.flat(output), self.flat(lse)

    def attend_backward(self, grad, query, key, value, output, lse, rule, grad_key, grad_value):
        """Flat query gradient; adds the prefix gradients to grad_key, grad_value (B, Hkv, L, D)."""
        grad, query, output, lse = (self.gather(x) for x in (grad, query, output, lse))
        rows = slice(self.first, self.first + self.shape[0])
        grad_query = query.new_empty(*self.shape, *query.shape[1::2])
        for number, (start, stop, _, _) in enumerate(self.tiles):
            first, last, mask, _ = self._tile(number, rule.window, 0, query.dtype)
            part = attend_backward(
                grad[:, :, start:stop],
                query[:, :, start:stop],
                key[rows, :, first:last],
                value[rows, :, first:last],
                output[:, :, start:stop],
                lse[:, :, start:stop],
                rule.scale,
                mask,
                softcap=rule.softcap,
            )
            grad_query[:, start:stop] = part[0].transpose(1, 2)
            grad_key[rows, :, first:last] += part[1]
            grad_value[rows, :, first:last] += part[2]
        return self.flat(grad_query)


class PrefixPass:
    """Plain causal attention over aligned rows (padding last, so no mask is needed); keeps each layer's keys."""

    def start(self):
        self.keys, self.rules = [], []

    def layer(self, query, key, value, rule):
        self.keys.append((key.contiguous(), value.contiguous()))  # every step of every thought reads them
        self.rules.append(rule)
        output, lse = causal_attend(query, key, value, rule)
        output, lse = output.transpose(1, 2), lse.transpose(1, 2)
        return output if rule.sinks is None else add_sinks(output, lse, rule.sinks)[0]


class StepPass:
    """One more token (or the last two) for every stream: attends to its prefix and to its own earlier tokens.

    Streams lie flat as one sequence of S * W tokens. keys: prefix (key, value) per layer; row, limit (S,): prefix
    row of each stream and how many of its tokens it sees, sorted by row; length: T.
    """

    def __init__(self, keys, row, limit, length):
        self.keys, self.grid, self.length = keys, Grid(row, limit, limit, _STEP_TILE), length
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
        self.grid = Grid(row, limit, limit, _STEP_TILE)
        for number, own in enumerate(self.own):
            kept = own.new_empty(2, self.length, len(streams), *own.shape[3:])
            kept[:, : self.done] = own[:, : self.done].index_select(2, streams)
            self.own[number] = kept


class Pad:
    """Ragged sequences that lie flat one after the other, as one rectangle (R, L) and back."""

    def __init__(self, lengths):
        self.shape = (len(lengths), int(lengths.max()))
        self.size = int(lengths.sum())
        column = torch.arange(self.shape[1], device=lengths.device)
        real = column < lengths.unsqueeze(1)
        self.real = None if bool(real.all()) else real.flatten().nonzero().squeeze(1)
        start = lengths.cumsum(0) - lengths
        self.source = torch.where(real, start.unsqueeze(1) + column, self.size).flatten()

    def gather(self, x):
        """(flat, H, ...) as (R, H, L, ...), zeros behind each sequence."""
        if self.real is not None:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.source)
        return x.unflatten(0, self.shape).transpose(1, 2)

    def flat(self, x):
        """(R, H, L, ...) back to (flat, H, ...)."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.real is None else x.index_select(0, self.real)


class PackedPass:
    """Attention over one packed sequence: all prefix rows, then all thoughts with their true tokens.

    text: Pad of the prefix rows; own: Pad of the thoughts; grid: the thought tokens as queries of the prefix rows.
    """

    def __init__(self, text, own, grid):
        self.text, self.own, self.grid = text, own, grid

    def start(self):
        pass

    def layer(self, query, key, value, rule):
        flat = (x[0].transpose(0, 1) for x in (query, key, value))
        return _PackedAttention.apply(*flat, rule.sinks, rule, self).unsqueeze(0)


class _PackedAttention(torch.autograd.Function):
    """Flat query (Q, H, D), key, value (Q, Hkv, D) to flat output; each part's backward uses the merged LSE."""

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
        text_grads = causal_attend_backward(*text, rule)
        own_grads = [work.own.flat(x) for x in causal_attend_backward(*own, rule)]
        own_grads[0] = own_grads[0] + work.grid.attend_backward(
            grad[cut:], query[cut:], text[2], text[3], output[cut:], lse[cut:], rule, *text_grads[1:]
        )
        grads = [torch.cat([work.text.flat(a), b]) for a, b in zip(text_grads, own_grads)]
        grad_sinks = None
        if sinks is not None:
            share = (sinks.to(lse.dtype) - lse).exp()
            grad_sinks = -(share * (grad * output).sum(-1)).sum(0).to(sinks.dtype)
        return *grads, grad_sinks, None, None


def packed_pass(model, text, text_real, row, limit, own, own_real):
    """Final states (flat, hidden) of all texts (R, L), then all own tokens (S, W), where real, in one pass.

    row, limit (S,): which text each own sequence follows, sorted, and after how many of its tokens.
    """
    base = backbone(model)
    if not len(own):
        return base.get_input_embeddings().weight.new_zeros(0, model.config.get_text_config().hidden_size)
    lengths = own_real.sum(1)
    text_place = torch.arange(text.shape[1], device=text.device).expand_as(text)[text_real]
    own_place = (limit.unsqueeze(1) + torch.arange(own.shape[1], device=own.device))[own_real]
    grid = Grid(row.repeat_interleave(lengths), limit.repeat_interleave(lengths), own_place, _PACKED_TILE)
    work = PackedPass(Pad(text_real.sum(1)), Pad(lengths), grid)
    ids, places = torch.cat([text[text_real], own[own_real]]), torch.cat([text_place, own_place])
    return forward(base, ids.unsqueeze(0), places.unsqueeze(0), work)[0]
