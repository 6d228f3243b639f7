"""All texts, thoughts and look-ahead tokens in one differentiable pass, packed without padding.

Attention runs by key set and is merged; its backward pass recomputes the weights from the merged log-sum-exp, so
nothing quadratic in the text is kept.
"""

import torch

from .attention import add_sinks, backbone, causal_attend, causal_attend_backward, forward, merge
from .prefix import Grid

_TILE = 1024


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
    grid = Grid(row.repeat_interleave(lengths), limit.repeat_interleave(lengths), own_place, _TILE)
    work = PackedPass(Pad(text_real.sum(1)), Pad(lengths), grid)
    ids, places = torch.cat([text[text_real], own[own_real]]), torch.cat([text_place, own_place])
    return forward(base, ids.unsqueeze(0), places.unsqueeze(0), work)[0]
