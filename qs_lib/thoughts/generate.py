"""Thoughts at many positions at once: sampling them. Re-scoring them is in `rescore.py`.

Quiet-STaR (arXiv 2403.09629, section 4.2) generates one thought after every token in parallel. Here the text is
read once; its keys and values are shared by all thoughts and never copied. Each step then adds one token to every
thought that is still running.
"""

from dataclasses import dataclass, replace

import torch

from .attention import LanguageHead, backbone, forward, thinking
from .fallback import PlainSteps, shares_prefix, spliced
from .prefix import PrefixPass, StepPass, align_rows
from .sampler import draw_seed, forbidden, sample, uniforms

_COMPACT_BELOW = 0.85
_LOGIT_NUMBERS = 8_000_000
_PER_STREAM = ("tokens", "logprobs", "sampled", "lengths", "hidden")


@dataclass
class Thoughts:
    """Sampled thoughts; P positions per row, N = num_thoughts, T = thought_length.

    tokens (batch, P, N, T): <think> first, padded with the id of </think> after the end. logprobs, same shape:
    natural log-probability of each sampled token at the sampling temperature (at 1 when greedy), before top_p;
    0 where `sampled` (bool, same shape) is False. lengths (batch, P, N): tokens including both tags, 0 where
    positions is -1. hidden (batch, P, N, hidden): what the head reads after </think>, or None.
    positions (batch, P). temperature, forbid, think_id, end_id: as used.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampled: torch.Tensor
    lengths: torch.Tensor
    hidden: torch.Tensor | None
    positions: torch.Tensor
    temperature: float
    forbid: tuple
    think_id: int
    end_id: int

    def part(self, rows=slice(None), slots=slice(None)):
        """The thoughts of some rows and some places of `positions` (slices or indices), to re-score a share at a time."""
        return self.map(lambda tensor: tensor[rows, slots])

    def map(self, change):
        """Thoughts with ``change`` applied to every tensor, each (batch, P, ...)."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})

    @staticmethod
    def cat(several):
        """The thoughts of several batches as one; their hidden states are left out."""
        tensors = [
            name for name, value in vars(several[0]).items() if isinstance(value, torch.Tensor) and name != "hidden"
        ]
        return replace(several[0], hidden=None, **{n: torch.cat([getattr(one, n) for one in several]) for n in tensors})

    def to_text(self, tokenizer):
        """Nested lists [batch][P][N] of decoded thoughts, tags included; '' where there is no thought."""
        lengths = self.lengths.tolist()
        return [
            [[tokenizer.decode(t[:n]) if n else "" for t, n in zip(*unit)] for unit in zip(*row)]
            for row in zip(self.tokens.tolist(), lengths)
        ]


def _cut(thoughts, index, fields):
    given = {name: getattr(thoughts, name) for name in fields}
    return replace(thoughts, **{name: value[index] for name, value in given.items() if value is not None})


def end_ids(model, think_id, end_id):
    """The ids of <think> and </think>: as given, else from the model's config. Raises ValueError."""
    found = []
    for given, name in ((think_id, "think_token_id"), (end_id, "end_think_token_id")):
        given = getattr(model.config, name, None) if given is None else given
        if given is None:
            raise ValueError(f"model.config.{name} is not set: run add_thinking_tokens first or pass the id.")
        found.append(int(given))
    return found


@torch.no_grad()
def generate_thoughts(
    model,
    input_ids,
    attention_mask=None,
    positions=None,
    num_thoughts=4,
    thought_length=16,
    temperature=1.0,
    top_p=1.0,
    generator=None,
    think_id=None,
    end_id=None,
    max_streams=1024,
    forbid=(),
    with_hidden=True,
    numbers=None,
):
    """Samples `num_thoughts` thoughts after each of the given positions, all at once.

    input_ids, attention_mask: (batch, length), padded on either side. positions: None for every position, or
    LongTensor (batch, P) of token indices, -1 for none; a thought follows the token at its position and helps to
    predict the tokens after it. thought_length: largest number of tokens, both tags included. A thought ends when
    </think> is sampled; otherwise </think> is forced as token number thought_length. temperature 0 is greedy.
    generator: where the one seed comes from; tokens then depend only on (seed, row, position, thought, step) and
    the text before them, not on padding, on max_streams (streams computed together, which bounds memory) or on
    other rows. numbers (batch,): the rows' numbers in that sense, 0, 1, ... by default; a part of a batch with its own numbers
    draws what the whole batch would. with_hidden False: Thoughts.hidden is None and the pass that reads </think> is saved (re-scoring
    gives those states too). forbid: token ids never sampled inside a thought; <think> never is. Dropout is off. Log-probs are
    those of the distribution without the forbidden tokens, at the temperature and before top_p.

    For sampling in bfloat16 pass a bfloat16 copy of the model; take log-probs from `rescore_thoughts` with the
    float32 model. Deviation from Quiet-STaR: tokens are sampled, not Gumbel-softmax one-hots, and thoughts end
    when the model says so, not at a fixed length.

    Returns Thoughts. Raises ValueError for bad shapes, positions or ids, NotImplementedError for a model whose
    attention cannot be shared this way.
    """
    think_id, end_id = end_ids(model, think_id, end_id)
    if num_thoughts < 1 or thought_length < 2:
        raise ValueError("num_thoughts must be at least 1 and thought_length at least 2 (both tags).")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("temperature must be >= 0 and top_p in (0, 1].")
    forbid = tuple(sorted({int(i) for i in forbid} | {think_id}))
    if end_id in forbid:
        raise ValueError("</think> must stay possible inside a thought; it is among the forbidden ids.")
    input_ids = input_ids.to(model.device)
    attention_mask = None if attention_mask is None else attention_mask.to(model.device)
    rows = align_rows(input_ids, attention_mask, positions)
    seed = draw_seed(generator)
    units, device = len(rows.row), input_ids.device
    wide = torch.promote_types(model.dtype, torch.float32)
    streams = units * num_thoughts
    result = Thoughts(
        tokens=torch.full((streams, thought_length), end_id, device=device),
        logprobs=torch.zeros(streams, thought_length, dtype=wide, device=device),
        sampled=torch.zeros(streams, thought_length, dtype=torch.bool, device=device),
        lengths=torch.zeros(streams, dtype=torch.long, device=device),
        hidden=None,
        positions=rows.positions,
        temperature=float(temperature),
        forbid=forbid,
        think_id=think_id,
        end_id=end_id,
    )
    if with_hidden:
        size = model.config.get_text_config().hidden_size
        result.hidden = torch.zeros(streams, size, dtype=model.dtype, device=device)
    shared, base = shares_prefix(model), backbone(model)
    number = rows.row if numbers is None else numbers.to(device)[rows.row]
    used, line = rows.row.unique(return_inverse=True)
    ids, limit, first = rows.ids[used], rows.position + 1, None
    # Inference mode makes each small operation cheaper. The result was made outside it, so that autograd can use it;
    # models whose own code keeps things between calls (the unshared ones) must not keep inference tensors.
    with thinking(model, own_attention=not shared), torch.inference_mode(shared):
        if units and shared:
            ids = ids[:, : int(limit.max())]
            prefix = PrefixPass()
            # With one position a row, <think> simply follows the text and is read along with it.
            fused = len(used) == units and thought_length > 2
            if fused:
                ids = spliced(ids, line, limit, torch.full_like(limit, think_id).unsqueeze(1))
            states = forward(base, ids, torch.arange(ids.shape[1], device=device).expand_as(ids), prefix)
            first = states[line, limit] if fused else None
        for start, stop in groups(rows.row, max(1, max_streams // num_thoughts)):
            part = slice(start, stop)
            if shared:
                step = StepPass(prefix.keys, line[part], limit[part], thought_length)
            else:
                step = PlainSteps(ids, line[part], limit[part], thought_length)
            if first is not None:
                step.take_first()
            _generate_group(
                base,
                LanguageHead(model),
                step,
                line[part],
                limit[part],
                number[part],
                None if first is None else first[part],
                num_thoughts,
                seed,
                top_p,
                _cut(result, slice(start * num_thoughts, stop * num_thoughts), _PER_STREAM),
            )
    return _unpacked(result, rows, num_thoughts)


def groups(row, size):
    """Cuts units (sorted by row) into runs of at most `size`, at row borders where whole rows fit."""
    count = torch.bincount(row)
    count = count[count > 0]
    if len(count) and (count == count[0]).all() and count[0] <= size:
        size -= size % int(count[0])
    return [(start, min(start + size, len(row))) for start in range(0, len(row), size)]


def _generate_group(base, head, step, line, limit, row, first, num_thoughts, seed, top_p, result):
    """Fills `result`, the flat streams of some units. Running streams are rows `at` of it, all of them at first."""
    states = result.hidden is not None
    length, end_id, device = result.tokens.shape[1], result.end_id, line.device
    forbid = forbidden(result.forbid, head.size, device)
    token, place = torch.full_like(line, result.think_id), limit
    # <think> is computed once per position; from then on there is one stream per thought.
    stream = torch.arange(len(line) * num_thoughts, device=device)
    unit, at = stream // num_thoughts, slice(None)
    line, limit = line[unit], limit[unit]
    uniform = uniforms(seed, row[unit], limit, stream % num_thoughts, length)
    running = torch.ones_like(stream, dtype=torch.bool)
    result.tokens[:, 0] = result.think_id
    left = len(stream)

    def finish(finished, lengths):
        result.lengths[stream[finished]] = lengths
        running[finished] = False
        return left - len(finished)

    for t in range(length - 1):
        last = t == length - 2
        if t > 0 and left <= _COMPACT_BELOW * len(stream):
            keep = running.nonzero().squeeze(1)
            token, stream, running, place, uniform = (x[keep] for x in (token, stream, running, place, uniform))
            at = stream
            step.select(keep, line[stream], place)
        if last and not states:
            result.lengths[stream[running]] = length
            return
        ended = token == end_id
        if last:
            # Nothing is sampled after this token, so it and the forced </think> go in one step.
            pairs = torch.stack([token, torch.full_like(token, end_id)], 1).flatten()
            hidden = step.forward(base, pairs, torch.stack([place + t, place + t + 1], 1).flatten(), 2)
            hidden = torch.where(ended.unsqueeze(1), hidden[::2], hidden[1::2])
        elif t == 0 and first is not None:
            hidden = first
        else:
            hidden = step.forward(base, token, place + t, 1)
        if t == 0 and last:
            hidden, ended = hidden[unit], ended[unit]
        elif t == 0:
            step.select(unit, line, limit)
            place = limit
        if states and (t > 0 or last):
            finished = (running if last else running & ended).nonzero().squeeze(1)
            if len(finished):
                result.hidden[stream[finished]] = hidden[finished]
                left = finish(finished, torch.where(ended[finished], t + 1, t + 2))
            if not left:
                return
        token, logprob = _draw(head, hidden, uniform[:, t + 1], result, top_p, forbid)
        if left < len(stream):
            token, logprob = torch.where(running, token, end_id), logprob.masked_fill(~running, 0)
        result.tokens[at, t + 1], result.sampled[at, t + 1] = token, running
        result.logprobs[at, t + 1] = logprob.to(result.logprobs.dtype)
        if not states:
            finished = (running & (token == end_id)).nonzero().squeeze(1)
            if len(finished):
                left = finish(finished, t + 2)
            if not left:
                return


def _draw(head, hidden, uniform, result, top_p, forbid):
    # At the first step one row of hidden states serves all thoughts of a position.
    repeat = len(uniform) // len(hidden)
    size = max(128, _LOGIT_NUMBERS // head.size) // repeat or 1
    parts = []
    for start in range(0, len(hidden), size):
        logits = head(hidden[start : start + size])
        logits = logits.repeat_interleave(repeat, 0) if repeat > 1 else logits
        chosen = uniform[start * repeat : (start + size) * repeat]
        parts.append(sample(logits, chosen, result.temperature, top_p, forbid))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _unpacked(result, rows, num_thoughts):
    batch, count = rows.positions.shape
    for name, empty in (("tokens", result.end_id), ("logprobs", 0), ("sampled", False), ("lengths", 0), ("hidden", 0)):
        flat = getattr(result, name)
        if flat is None:
            continue
        full = flat.new_full((batch * count, num_thoughts, *flat.shape[1:]), empty)
        full[rows.slot] = flat.unflatten(0, (len(rows.slot), num_thoughts))
        setattr(result, name, full.unflatten(0, (batch, count)))
    return result
