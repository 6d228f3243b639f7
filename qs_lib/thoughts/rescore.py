"""Re-score thoughts: their log-probs and what they predict, in one differentiable pass.

Quiet-STaR (arXiv 2403.09629, sections 4.2, 4.4) trains on the text, all thoughts and the true tokens after each.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from .attention import LanguageHead, backbone, view
from .fallback import check_room, plain_states, shares_prefix
from .prefix import Packed, align_rows, packed_states
from .sampler import forbidden


@dataclass
class Rescored:
    """What ``rescore_thoughts`` computes, in natural logs. P, N and T are as in ``Thoughts``, V is the vocabulary.

    ``thought_logprobs`` (batch, P, N, T): as ``Thoughts.logprobs``.
    ``thought_entropy`` (batch, P, N, T): entropy (nats) of the distribution each sampled token came from, else 0.
    ``true_logprobs`` (batch, P, N, n_true): of the true tokens after each thought, at temperature 1, each given the
    true tokens before it. ``base_logprobs`` (batch, P, n_true): the same without a thought.
    ``valid`` (batch, P, n_true): the true token exists. Where it does not, the log-probs are 0.
    ``true`` (batch, P, n_true): the true tokens, any token where there is none.
    ``thought_hidden`` (batch, P, N, n_true, hidden), ``base_hidden`` (batch, P, n_true, hidden): the states that
    predict them. ``true_full`` (batch, P, N, n_true, V), ``base_full`` (batch, P, n_true, V): log-softmax from those
    states, or None. Index 0 of these four is filled wherever there is a thought, even when no true token follows.
    Without ``after``, ``thought_entropy``, ``true_logprobs``, ``thought_hidden`` and ``true_full`` are None.
    """

    thought_logprobs: torch.Tensor
    thought_entropy: torch.Tensor | None
    true_logprobs: torch.Tensor | None
    base_logprobs: torch.Tensor
    valid: torch.Tensor
    true: torch.Tensor
    thought_hidden: torch.Tensor | None
    base_hidden: torch.Tensor
    true_full: torch.Tensor | None = None
    base_full: torch.Tensor | None = None


def target_scores(head, hidden, target, temperature=1.0, forbid=None, entropy=False):
    """Return the log-prob (R,) of each target and the entropy (R,) or None, from hidden (R, hidden).

    With many rows the logits are made again in the backward pass, some rows at a time.
    """

    def score(hidden, target):
        logits = head(hidden, forbid)
        if temperature not in (0, 1):
            logits = logits / temperature
        total = logits.logsumexp(-1)
        logprob = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - total
        if not entropy:
            return logprob, None
        finite = logits if forbid is None else logits.index_fill(-1, forbid, 0)
        return logprob, total - ((logits - total.unsqueeze(-1)).exp() * finite).sum(-1)

    if len(hidden) <= head.rows:
        return score(hidden, target)
    pairs = zip(hidden.split(head.rows), target.split(head.rows))
    parts = [checkpoint(score, *pair, use_reentrant=False) for pair in pairs]
    return [torch.cat(part) if part[0] is not None else None for part in zip(*parts)]


def _scattered(shape, index, values):
    """Return values (R, ...) at ``index`` of the flattened shape, zeros elsewhere, as (*shape, ...). Differentiable."""
    flat = values.new_zeros(shape.numel(), *values.shape[1:])
    return flat.index_put((index,), values).view(*shape, *values.shape[1:])


def _look_ahead(head, forbid, full, states, start, exists, targets, place, shape):
    """Return what consecutive states predict: hidden (*shape, n_true, hidden), log-probs (*shape, n_true), and full.

    ``states`` (R, hidden). ``start`` (X,): first state of each. ``exists``, ``targets`` (X, n_true): the true tokens.
    ``place`` (X,): place of each in the flattened shape.
    """
    count = exists.shape[1]
    kept = exists.clone()
    kept[:, 0] = True
    line, step = kept.nonzero(as_tuple=True)
    # Neighbouring positions of one text read the same states.
    source, inverse = (start[line] + step).unique(return_inverse=True)
    target = torch.zeros_like(source).scatter_(0, inverse, targets[line, step])
    hidden, everything = states[source], None
    if full:
        everything = head(hidden, forbid).log_softmax(-1)
        logprob = everything.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    else:
        logprob, _ = target_scores(head, hidden, target, forbid=forbid)
    logprob = logprob[inverse].masked_fill(~exists[line, step], 0)
    scattered = partial(_scattered, torch.Size((*shape, count)), place[line] * count + step)
    return scattered(hidden[inverse]), scattered(logprob), scattered(everything[inverse]) if full else None


def _distinct(thoughts, slot):
    """Return which thoughts of some units are read (S,), and for all of them (U * N,) where in those their own is.

    Of equal thoughts of a unit the first is read. ``slot`` (U,): the units' places in the flattened (batch, P).
    """
    marks = torch.cat([thoughts.tokens, thoughts.sampled, thoughts.lengths[..., None]], -1).flatten(0, 1)[slot]
    first = (marks.unsqueeze(2) == marks.unsqueeze(1)).all(-1).byte().argmax(-1)
    start = torch.arange(len(slot), device=slot.device) * marks.shape[1]
    return (start.unsqueeze(1) + first).flatten().unique(return_inverse=True)


def _layout(rows, thoughts, first, n_true, after_thoughts):
    """Return what goes into the pass, for U thought units (sorted by row, then position) and S streams.

    ``Packed``: texts that have thoughts, read as far as needed, and the streams: a thought (its number in the U * N is
    ``first`` (S,)) and the true tokens after it but the last, which is only predicted. ``line`` (U,): the text of each
    unit among these. ``true``, ``exists`` (U, n_true): the true tokens, and which of them exist.
    """
    device, (number, longest) = rows.ids.device, thoughts.tokens.shape[2:]
    width, limit = rows.ids.shape[1], rows.position + 1
    ahead = (rows.lengths[rows.row] - limit).clamp(max=n_true)
    fed = (ahead - 1).clamp(min=0)  # true tokens that are read
    read = torch.zeros_like(rows.lengths).scatter_reduce(0, rows.row, limit + fed, "amax")
    used, line = rows.row.unique(return_inverse=True)
    step = torch.arange(n_true, device=device)
    true = rows.ids[rows.row.unsqueeze(1), (limit.unsqueeze(1) + step).clamp(max=width - 1)]
    unit, thought = first // number, first % number
    tokens, length = (x.flatten(0, 1)[rows.slot[unit], thought] for x in (thoughts.tokens, thoughts.lengths))
    column = torch.arange(longest + n_true - 1, device=device)
    after = column - length.unsqueeze(1)
    written, given = tokens[:, column.clamp(max=longest - 1)], true[unit].gather(1, after.clamp(0, n_true - 1))
    text_real = torch.arange(width, device=device) < read[used].unsqueeze(1)
    last = fed[unit].unsqueeze(1) if after_thoughts else -1  # nothing then needs the state of </think>
    own, own_real = torch.where(after < 0, written, given), after < last
    packed = Packed(rows.ids[used], text_real, line[unit], limit[unit], own, own_real)
    return packed, line, true, step < ahead.unsqueeze(1)


def flat_states(model, packed):
    """Return the final states (flat, hidden) of all real text tokens, then of all real own tokens."""
    if not len(packed.own):
        return model.get_input_embeddings().weight.new_zeros(0, LanguageHead(model).width)
    own = packed.own_real.sum(1)
    longest = (packed.limit + own).argmax()
    check_room(model, int(packed.limit[longest]), int(own[longest]))
    shared = shares_prefix(model)
    base = backbone(view(model, own_attention=not shared))
    return (packed_states if shared else plain_states)(base, packed)


def rescore_thoughts(
    model, input_ids, thoughts, attention_mask=None, n_true=4, forbid_true=(), true_logits=False, after=True
):
    """Score given thoughts, and the next ``n_true`` true tokens with and without them. Returns ``Rescored``.

    ``input_ids``, ``attention_mask`` (batch, length): as given to ``generate_thoughts``. ``forbid_true``: ids that
    cannot be predicted as text. Their logits are -inf in ``true_logprobs``, ``base_logprobs``, ``true_full`` and
    ``base_full``. ``true_logits``: also return the full log-softmax. ``after`` False leaves out what follows the
    thoughts, and their entropy: a reference model is asked for neither. Dropout is off, so that the log-probs are those
    of the policy that sampled.

    One pass reads prefix rows, thoughts and true tokens without padding, and equal thoughts of a position once. Its
    memory grows linearly with the number of tokens: to bound it, score ``thoughts.part(...)``, some rows or positions
    at a time. Gradients are exact, not twice differentiable. Quiet-STaR's code differentiates sampling, this does not.

    Raises ``ValueError`` if shapes or ids are wrong, ``NotImplementedError`` if the model is not served.
    """
    if n_true < 1:
        raise ValueError("n_true must be at least 1.")
    rows = align_rows(model.device, input_ids, attention_mask, thoughts.positions)
    head, (first, stream) = LanguageHead(model), _distinct(thoughts, rows.slot)
    packed, line, true, exists = _layout(rows, thoughts, first, n_true, after)
    forbid, forbid_true = (forbidden(ids, head.size, model.device) for ids in (thoughts.forbid, forbid_true))
    text_states, own_states = flat_states(model, packed).tensor_split([int(packed.text_real.sum())])
    counts = (real.sum(1) for real in (packed.text_real, packed.own_real))
    text_start, own_start = (count.cumsum(0) - count for count in counts)
    slots, shape = thoughts.positions.shape, thoughts.tokens.shape
    place = (rows.slot.unsqueeze(1) * shape[2] + torch.arange(shape[2], device=model.device)).flatten()
    # The state before each sampled token.
    own, step = thoughts.sampled.flatten(0, 2)[place[first]].nonzero(as_tuple=True)
    before, target = own_states[own_start[own] + step - 1], packed.own[own, step]
    logprob, entropy = target_scores(head, before, target, thoughts.temperature, forbid, entropy=after)

    def sampled(values):
        each = _scattered(torch.Size((len(first), shape[3])), own * shape[3] + step, values)
        return _scattered(shape[:3], place, each[stream])

    look_ahead = partial(_look_ahead, head, forbid_true, true_logits)
    thought_hidden, true_logprobs, true_full = None, None, None
    if after:
        each = (x.repeat_interleave(shape[2], 0) for x in (exists, true))  # of a unit, for each of its thoughts
        last = own_start[stream] + thoughts.lengths.flatten()[place] - 1
        thought_hidden, true_logprobs, true_full = look_ahead(own_states, last, *each, place, shape[:3])
    start = text_start[line] + rows.position
    base_hidden, base_logprobs, base_full = look_ahead(text_states, start, exists, true, rows.slot, slots)
    logprobs = sampled(logprob), sampled(entropy) if after else None, true_logprobs, base_logprobs
    valid, true = (_scattered(slots, rows.slot, x) for x in (exists, true))
    return Rescored(*logprobs, valid, true, thought_hidden, base_hidden, true_full, base_full)
