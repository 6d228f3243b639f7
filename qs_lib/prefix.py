"""The text before the thoughts: rows without padding, and attention of many thoughts to one shared copy of it."""

from typing import NamedTuple

import torch

from .attention import add_sinks, attend, attend_backward, causal_attend, visibility

_KEPT_NUMBERS = 4_000_000


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
                query[:, :, start:stop], key[rows, :, first:last], value[rows, :, first:last], rule.scale, mask,
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
                grad[:, :, start:stop], query[:, :, start:stop], key[rows, :, first:last],
                value[rows, :, first:last], output[:, :, start:stop], lse[:, :, start:stop], rule.scale, mask,
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
