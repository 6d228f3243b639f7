"""Thoughts at many positions at once: their log-probs and what they predict, in one differentiable pass.

Quiet-STaR (arXiv 2403.09629, sections 4.2 and 4.4) trains on the text, all thoughts and the true tokens after
each thought.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .attention import LanguageHead, thinking
from .fallback import plain_states, shares_prefix
from .prefix import align_rows, packed_pass
from .sampler import forbidden

_LOGIT_NUMBERS = 8_000_000


@dataclass
class Rescored:
    """What `rescore_thoughts` computes; B, P, N, T as in Thoughts, V the vocabulary. Log-probs are natural.

    thought_logprobs (B, P, N, T): as Thoughts.logprobs. thought_entropy (B, P, N, T): entropy in nats of the
    distribution each sampled token came from, 0 elsewhere. true_logprobs (B, P, N, n_true): of the true tokens
    after each thought, at temperature 1, each given the true tokens before it. base_logprobs (B, P, n_true): the
    same without a thought. valid (B, P, n_true): the true token exists; where False the log-probs are 0.
    true (B, P, n_true): the true tokens; some token where there is none.
    thought_hidden (B, P, N, n_true, hidden), base_hidden (B, P, n_true, hidden): the states that made them.
    true_full (B, P, N, n_true, V), base_full (B, P, n_true, V): log-softmax from those states, or None. Of these
    four, index 0 is filled wherever there is a thought, even when no true token follows.
    """

    thought_logprobs: torch.Tensor
    thought_entropy: torch.Tensor
    true_logprobs: torch.Tensor
    base_logprobs: torch.Tensor
    valid: torch.Tensor
    true: torch.Tensor
    thought_hidden: torch.Tensor
    base_hidden: torch.Tensor
    true_full: torch.Tensor | None = None
    base_full: torch.Tensor | None = None


def _scores(hidden, target, head, temperature, forbid, entropy):
    logits = head(hidden)
    if temperature not in (0, 1):
        logits = logits / temperature
    if forbid is not None:
        logits = logits.index_fill(-1, forbid, -torch.inf)
    total = logits.logsumexp(-1)
    logprob = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - total
    if not entropy:
        return logprob, None
    finite = logits if forbid is None else logits.index_fill(-1, forbid, 0)
    return logprob, total - ((logits - total.unsqueeze(-1)).exp() * finite).sum(-1)


def scored(head, hidden, target, temperature=1.0, forbid=None, entropy=False):
    """Log-prob of each target and entropy (or None), (R,) each, from hidden (R, hidden).

    With many rows the logits are made again in the backward pass, a few rows at a time.
    """
    size = max(1, _LOGIT_NUMBERS // head.size)
    score = partial(_scores, head=head, temperature=temperature, forbid=forbid, entropy=entropy)
    if len(hidden) <= size:
        return score(hidden, target)
    parts = [
        checkpoint(score, hidden[i : i + size], target[i : i + size], use_reentrant=False)
        for i in range(0, len(hidden), size)
    ]
    return [torch.cat(part) if part[0] is not None else None for part in zip(*parts)]


def _full(head, hidden, forbid):
    logits = head(hidden)
    return (logits if forbid is None else logits.index_fill(-1, forbid, -torch.inf)).log_softmax(-1)


def _placed(shape, index, values):
    # Differentiable: values (R, ...) at `index` of a flat array, zeros elsewhere; then reshaped.
    flat = values.new_zeros(shape.numel(), *values.shape[1:])
    return flat.index_put((index,), values).view(*shape, *values.shape[1:])


def _look_ahead(head, states, start, exists, targets, where, shape, forbid, full):
    """What consecutive states predict: hidden (*shape, n_true, hidden), log-probs (*shape, n_true), full or None.

    states (R, hidden); start (X,): first state of each; exists, targets (X, n_true); where (X,): place in shape.
    """
    count = exists.shape[1]
    kept = exists.clone()
    kept[:, 0] = True
    line, step = kept.nonzero(as_tuple=True)
    # Neighbouring positions of one text read the same states.
    source, inverse = (start[line] + step).unique(return_inverse=True)
    target = torch.zeros_like(source).scatter_(0, inverse, targets[line, step])
    hidden = states[source]
    everything = _full(head, hidden, forbid) if full else None
    if full:
        logprob = everything.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    else:
        logprob, _ = scored(head, hidden, target, forbid=forbid)
    logprob = logprob[inverse].masked_fill(~exists[line, step], 0)
    shape, index = torch.Size((*shape, count)), where[line] * count + step
    return (
        _placed(shape, index, hidden[inverse]),
        _placed(shape, index, logprob),
        _placed(shape, index, everything[inverse]) if full else None,
    )


class _Layout(NamedTuple):
    """What goes into the pass, for U thought units (sorted by row, then position) and S = U * N streams.

    text (R, L), text_real: texts that have thoughts, and the tokens of them that are read; line (U,): text of each
    unit; limit (U,): tokens of it that the thought sees. own (S, W), own_real: thought and true tokens after it but
    the last, which is only predicted; length (S,): tokens of the thought; unit (S,). true, exists (U, n_true): the
    true tokens and which of them exist. place (S,): of a stream in the flattened (B, P, N).
    """

    text: torch.Tensor
    text_real: torch.Tensor
    line: torch.Tensor
    limit: torch.Tensor
    own: torch.Tensor
    own_real: torch.Tensor
    length: torch.Tensor
    unit: torch.Tensor
    true: torch.Tensor
    exists: torch.Tensor
    place: torch.Tensor


def _layout(rows, thoughts, n_true):
    device, (number, longest) = rows.ids.device, thoughts.tokens.shape[2:]
    width, limit = rows.ids.shape[1], rows.position + 1
    ahead = (rows.lengths[rows.row] - limit).clamp(max=n_true)
    read = torch.zeros_like(rows.lengths)
    read = read.scatter_reduce(0, rows.row, limit + (ahead - 1).clamp(min=0), "amax")
    used, line = rows.row.unique(return_inverse=True)
    step = torch.arange(n_true, device=device)
    true = rows.ids[rows.row.unsqueeze(1), (limit.unsqueeze(1) + step).clamp(max=width - 1)]
    unit = torch.arange(len(limit), device=device).repeat_interleave(number)
    length = thoughts.lengths.flatten(0, 1)[rows.slot].flatten()
    tokens = thoughts.tokens.flatten(0, 1)[rows.slot].flatten(0, 1)
    column = torch.arange(longest + n_true - 1, device=device)
    after = column - length.unsqueeze(1)
    own = torch.where(
        after < 0, tokens[:, column.clamp(max=longest - 1)], true[unit].gather(1, after.clamp(0, n_true - 1))
    )
    return _Layout(
        text=rows.ids[used],
        text_real=torch.arange(width, device=device) < read[used].unsqueeze(1),
        line=line,
        limit=limit,
        own=own,
        own_real=after < (ahead - 1).clamp(min=0)[unit].unsqueeze(1),
        length=length,
        unit=unit,
        true=true,
        exists=step < ahead.unsqueeze(1),
        place=(rows.slot.unsqueeze(1) * number + torch.arange(number, device=device)).flatten(),
    )


def rescore_thoughts(
    model, input_ids, thoughts, attention_mask=None, n_true=4, forbid=None, forbid_true=(), true_logits=False
):
    """Log-probs of given thoughts and of the next `n_true` true tokens with and without them; differentiable.

    input_ids, attention_mask: as given to `generate_thoughts`. forbid: ids that thoughts cannot contain, the
    thoughts' own by default. forbid_true: ids that cannot be predicted as text (their logits are -inf in
    true_logprobs, base_logprobs, true_full, base_full). true_logits: also return the full log-softmax. Dropout is
    off, so that the log-probs are those of the policy that sampled.

    One pass over prefix rows, thoughts and true tokens without padding; memory grows linearly with the number of
    tokens: for a bound, call it for `thoughts.part(...)`, some rows or positions at a time. Exact gradients (not twice differentiable).
    Differs from Quiet-STaR's code, which keeps the sampling graph: sampling here is without gradient.

    Returns Rescored. Raises ValueError for bad shapes or ids, NotImplementedError for unsupported models.
    """
    if n_true < 1:
        raise ValueError("n_true must be at least 1.")
    input_ids = input_ids.to(model.device)
    attention_mask = None if attention_mask is None else attention_mask.to(model.device)
    rows = align_rows(input_ids, attention_mask, thoughts.positions)
    head, layout = LanguageHead(model), _layout(rows, thoughts, n_true)
    forbid = forbidden(thoughts.forbid if forbid is None else forbid, head.size, input_ids.device)
    forbid_true = forbidden(forbid_true, head.size, input_ids.device)
    slots, shape = thoughts.positions.shape, thoughts.tokens.shape
    shared = shares_prefix(model)
    with thinking(model, own_attention=not shared):
        states = (packed_pass if shared else plain_states)(
            model,
            layout.text,
            layout.text_real,
            layout.line[layout.unit],
            layout.limit[layout.unit],
            layout.own,
            layout.own_real,
        )
    text_lengths, own_lengths = layout.text_real.sum(1), layout.own_real.sum(1)
    text_start = text_lengths.cumsum(0) - text_lengths
    own_states, own_start = states[int(text_lengths.sum()) :], own_lengths.cumsum(0) - own_lengths
    # The state before each sampled token.
    stream, step = thoughts.sampled.flatten(0, 2)[layout.place].nonzero(as_tuple=True)
    logprob, entropy = scored(
        head, own_states[own_start[stream] + step - 1], layout.own[stream, step], thoughts.temperature, forbid, True
    )
    index = layout.place[stream] * shape[3] + step
    unit = layout.unit
    thought_hidden, true_logprobs, true_full = _look_ahead(
        head,
        own_states,
        own_start + layout.length - 1,
        layout.exists[unit],
        layout.true[unit],
        layout.place,
        shape[:3],
        forbid_true,
        true_logits,
    )
    base_hidden, base_logprobs, base_full = _look_ahead(
        head,
        states,
        text_start[layout.line] + layout.limit - 1,
        layout.exists,
        layout.true,
        rows.slot,
        slots,
        forbid_true,
        true_logits,
    )
    valid = torch.zeros(slots.numel(), n_true, dtype=torch.bool, device=input_ids.device)
    valid[rows.slot] = layout.exists
    true = torch.zeros_like(valid, dtype=torch.long)
    true[rows.slot] = layout.true
    return Rescored(
        _placed(shape, index, logprob),
        _placed(shape, index, entropy),
        true_logprobs,
        base_logprobs,
        valid.view(*slots, n_true),
        true.view(*slots, n_true),
        thought_hidden,
        base_hidden,
        true_full,
        base_full,
    )
