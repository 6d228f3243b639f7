"""Sample thoughts at many positions of a text at once. ``rescore.py`` gives their log-probs with gradients.

Quiet-STaR (arXiv 2403.09629, section 4.2) generates one thought after every token in parallel. Here the text is
read once. All thoughts share its keys and values, never copied. Each step adds a token to every unended thought.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from ..errors import at_least
from .attention import LanguageHead, backbone, forward, view
from .fallback import PlainSteps, check_room, shares_prefix, spliced
from .prefix import PrefixPass, StepPass, align_rows
from .sampler import draw_seed, forbidden, sample, uniforms

_COMPACT_BELOW = 0.85  # share of running thoughts at which they are computed alone from then on
_TOKENS = 2**32  # above any vocabulary: (stream, token) as one number


@dataclass
class Thoughts:
    """Sampled thoughts: P positions per row, N = ``num_thoughts``, T = ``thought_length``.

    ``tokens`` (batch, P, N, T): <think> first, padded with the id of </think> after the end.
    ``logprobs`` (batch, P, N, T): natural log-prob of each sampled token at the sampling temperature (at 1 when
    greedy), before ``top_p``. It is 0 where nothing was sampled.
    ``sampled`` (batch, P, N, T): which tokens were sampled. The tags that were forced were not.
    ``lengths`` (batch, P, N): tokens with both tags, 0 where there is no thought.
    ``hidden`` (batch, P, N, hidden): the state after </think>, which the mixing head reads, or None.
    ``positions`` (batch, P): the token that each thought follows, -1 for none. The other fields are as used.
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
        """Return the thoughts of some rows and some places of ``positions`` (slices or indices)."""
        return self.map(lambda tensor: tensor[rows, slots])

    def map(self, change):
        """Return the thoughts with ``change`` applied to every tensor (batch, P, ...)."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})

    @staticmethod
    def cat(several):
        """Return the thoughts of several batches as one, without their hidden states."""
        first = replace(several[0], hidden=None)
        names = [name for name, value in vars(first).items() if isinstance(value, torch.Tensor)]
        return replace(first, **{name: torch.cat([getattr(one, name) for one in several]) for name in names})

    def to_text(self, tokenizer):
        """Return nested lists [batch][P][N] of decoded thoughts with their tags, '' where there is no thought."""
        return [
            [[tokenizer.decode(t[:n]) if n else "" for t, n in zip(*unit)] for unit in zip(*row)]
            for row in zip(self.tokens.tolist(), self.lengths.tolist())
        ]


# Fifteen parameters: this is the public way to sample, and most callers set two or three of them by name.
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
    max_streams=None,
    forbid=(),
    with_hidden=True,
    numbers=None,
):
    """Sample ``num_thoughts`` thoughts after each position, all at once, and return ``Thoughts``.

    ``input_ids``, ``attention_mask`` (batch, length): padded on either side. ``positions`` (batch, P): a thought
    follows this token and helps to predict the tokens after it. -1 is none, and None is every position.
    ``thought_length``: most tokens of a thought with both tags. A thought ends when </think> is sampled, else
    </think> is forced as the last token. ``temperature`` 0 is greedy. ``forbid``: ids that are never sampled, and
    <think> never is. ``with_hidden=False`` saves the pass that reads </think>. ``max_streams``: thoughts computed
    together, which bounds memory, by default 1,024, on a GPU 4,096. ``generator`` gives one seed. A token depends on it,
    on the number of its row (``numbers`` (batch,), else 0, 1, ...), on position, thought and step, and on the text before
    it. In float32 padding, ``max_streams`` and the other rows change nothing. Dropout is off.

    To sample in bfloat16, pass a bfloat16 copy of the model and take log-probs from ``rescore_thoughts`` in float32.
    Unlike Quiet-STaR, tokens are sampled (no Gumbel-softmax), and the model decides when a thought ends.
    Raises ``ValueError`` if shapes, positions or ids are wrong, ``WorkbookError`` if the model has too few positions,
    ``NotImplementedError`` if it is not served.
    """
    think_id, end_id = _tag_ids(model, think_id, end_id)
    if num_thoughts < 1 or thought_length < 2:
        raise ValueError("num_thoughts must be at least 1 and thought_length at least 2 (both tags).")
    max_streams = (4096 if model.device.type == "cuda" else 1024) if max_streams is None else max_streams
    at_least(1, max_streams=max_streams)
    if not (temperature == 0 or 1e-12 <= temperature <= 1e12) or not 0 < top_p <= 1:  # NaN is neither
        raise ValueError("temperature must be 0 or between 1e-12 and 1e12, and top_p in (0, 1].")
    forbid = tuple(sorted({int(i) for i in forbid} | {think_id}))
    if end_id in forbid:
        raise ValueError("</think> must stay possible inside a thought; it is among the forbidden ids.")
    rows, shared = align_rows(model.device, input_ids, attention_mask, positions), shares_prefix(model)
    if not 0 <= end_id < LanguageHead(model).size:
        raise ValueError(f"end_id is {end_id}, which is none of the model's tokens: pass the id of one.")
    if len(rows.position):
        check_room(model, int(rows.position.max()) + 1, thought_length)
    used = {"temperature": float(temperature), "forbid": forbid, "think_id": think_id, "end_id": end_id}
    result = _blank(model, rows.positions, num_thoughts, thought_length, with_hidden, used)
    place, uniform = _streams(rows, num_thoughts, thought_length, draw_seed(generator), numbers)
    # Inference mode makes each small operation cheaper. The result was made outside it, so that autograd can use it.
    # Models that compute their own attention may keep tensors between calls, which must not be inference tensors.
    with torch.inference_mode(shared):
        model = view(model, own_attention=not shared)
        texts, head = _Texts(backbone(model), rows, think_id, thought_length, shared), LanguageHead(model)
        draw = partial(_draw, head, temperature, top_p, forbidden(forbid, head.size, model.device))
        size = max(1, max_streams // num_thoughts)
        for part in (slice(start, start + size) for start in range(0, len(rows.row), size)):
            _Group(*texts.steps(part), draw, result, place[part], uniform[part]).write()
    return result


def _tag_ids(model, think_id, end_id):
    """Return the ids of <think> and </think>: as given, else from the model's config."""
    found = []
    for given, name in ((think_id, "think_token_id"), (end_id, "end_think_token_id")):
        given = getattr(model.config, name, None) if given is None else given
        if given is None:
            raise ValueError(f"model.config.{name} is not set: run add_thinking_tokens first or pass the id.")
        found.append(int(given))
    return found


def _blank(model, positions, number, length, with_hidden, used):
    """Return ``Thoughts`` without a token yet. ``used``: the fields that are no tensors."""
    shape, zeros = (*positions.shape, number), partial(torch.zeros, device=positions.device)
    return Thoughts(
        tokens=torch.full((*shape, length), used["end_id"], device=positions.device),
        logprobs=zeros(*shape, length, dtype=torch.promote_types(model.dtype, torch.float32)),
        sampled=zeros(*shape, length, dtype=torch.bool),
        lengths=zeros(shape, dtype=torch.long),
        hidden=zeros(*shape, LanguageHead(model).width, dtype=model.dtype) if with_hidden else None,
        positions=positions,
        **used,
    )


def _streams(rows, number, length, seed, numbers):
    """Return the place (U, N) of each stream in the flattened (batch, P, N), and its uniform numbers (U, N, T)."""
    thought = torch.arange(number, device=rows.row.device)
    row = rows.row if numbers is None else numbers.to(rows.row.device)[rows.row]
    names = (x.repeat_interleave(number) for x in (row, rows.position + 1))
    uniform = uniforms(seed, *names, thought.repeat(len(row)), length)
    return rows.slot.unsqueeze(1) * number + thought, uniform.unflatten(0, (len(row), number))


class _Texts:
    """The texts that have thoughts. They are read once if their thoughts can share them."""

    def __init__(self, base, rows, think_id, length, shared):
        used, self.line = rows.row.unique(return_inverse=True)  # the text of each unit (U,)
        self.limit = rows.position + 1  # how many of its tokens the unit sees (U,)
        self.base, self.ids, self.length = base, rows.ids[used], length
        self.keys = self.first = None
        if not shared or not len(used):
            return
        ids = self.ids[:, : int(self.limit.max())]
        # With one position a row, <think> simply follows the text and is read along with it.
        with_think = len(used) == len(self.line) and length > 2
        if with_think:
            ids = spliced(ids, self.line, self.limit, torch.full_like(self.limit, think_id).unsqueeze(1))
        prefix = PrefixPass()
        states = forward(base, ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), prefix)
        self.keys = prefix.keys
        self.first = states[self.line, self.limit] if with_think else None

    def steps(self, part):
        """Return what reads the next tokens of some units, and their states after <think> where it was read."""
        line, limit = self.line[part], self.limit[part]
        if self.keys is None:
            return PlainSteps(self.base, self.ids, line, limit, self.length), None
        step = StepPass(self.base, self.keys, line, limit, self.length)
        if self.first is None:
            return step, None
        step.take_first()
        return step, self.first[part]


class _Group:
    """The thoughts of some units, written together from <think> to </think>.

    A stream is a beginning: thoughts that have drawn the same tokens so far share one. ``place`` (M,): where the
    thoughts still computed stand in the flattened result. ``stream``, ``token`` (M,): the stream of each, and its last
    token. ``running`` (M,): it has not ended, and ``left`` counts these. ``uniform`` (M, T): draws its tokens.
    """

    def __init__(self, step, first, draw, result, place, uniform):
        self.step, self.first, self.draw_tokens, self.end_id = step, first, draw, result.end_id
        fields = (result.tokens, result.logprobs, result.sampled, result.lengths)
        self.tokens, self.logprobs, self.sampled, self.lengths = (x.flatten(0, 2) for x in fields)
        self.hidden = None if result.hidden is None else result.hidden.flatten(0, 2)
        self.place, self.uniform = place.flatten(), uniform.flatten(0, 1)
        self.stream = torch.arange(len(place), device=place.device).repeat_interleave(place.shape[1])
        self.token = torch.full_like(self.place, result.think_id)
        self.running, self.left = torch.ones_like(self.place, dtype=torch.bool), len(self.place)

    def write(self):
        """Write every thought: read the last token, draw the next one, until all have ended."""
        length = self.tokens.shape[1]
        self.tokens[self.place, 0] = self.token
        for t in range(1, length - 1):
            hidden = self.read(t) if t > 1 or self.first is None else self.first
            if self.left:
                self.draw(t, hidden)
            if not self.left:
                return
        self.close(length)

    def read(self, t):
        """Return the states (S, hidden) after the tokens drawn last. Thoughts of ``t`` tokens may end with them."""
        hidden = self.step.forward(self.part().unsqueeze(1)).squeeze(1)
        if self.hidden is not None:
            self.end(self.token == self.end_id, t, hidden)
        return hidden

    def part(self):
        """Part the streams whose thoughts have drawn different tokens. Return the last token of each stream (S,)."""
        if self.left <= _COMPACT_BELOW * len(self.place):
            keep = self.running.nonzero().squeeze(1)
            thoughts = self.stream, self.token, self.place, self.uniform, self.running
            self.stream, self.token, self.place, self.uniform, self.running = (x[keep] for x in thoughts)
        both, self.stream = (self.stream * _TOKENS + self.token).unique(return_inverse=True)
        before, token = both // _TOKENS, both % _TOKENS
        if len(both) != len(self.step.row) or (before[1:] == before[:-1]).any():
            self.step.select(before)
        return token

    def draw(self, t, hidden):
        """Draw token number ``t`` of every thought and record it."""
        token, logprob = self.draw_tokens(hidden, self.stream, self.uniform[:, t])
        self.token = torch.where(self.running, token, self.end_id)
        self.tokens[self.place, t], self.sampled[self.place, t] = self.token, self.running
        self.logprobs[self.place, t] = logprob.masked_fill(~self.running, 0).to(self.logprobs.dtype)
        if self.hidden is None:  # nobody needs the state after </think>
            self.end(self.token == self.end_id, t + 1)

    def end(self, which, length, hidden=None):
        """End the running thoughts among ``which`` (M,) with ``length`` tokens, and keep their states."""
        ended = (which & self.running).nonzero().squeeze(1)
        if len(ended):
            self.lengths[self.place[ended]] = length
            if hidden is not None:
                self.hidden[self.place[ended]] = hidden[self.stream[ended]]
            self.running[ended] = False
            self.left -= len(ended)

    def close(self, length):
        """End what still runs with a forced </think>, read in one step with the token before it."""
        if self.hidden is None:
            self.end(self.running, length)
            return
        token = self.part()
        states = self.step.forward(torch.stack([token, torch.full_like(token, self.end_id)], 1))
        self.end(self.token == self.end_id, length - 1, states[:, 0])
        self.end(self.running, length, states[:, 1])


def _draw(head, temperature, top_p, forbid, hidden, stream, uniform):
    """Draw tokens (M,) and their log-probs (M,), some rows of logits at a time.

    ``hidden`` (S, hidden): states of the streams. ``stream``, ``uniform`` (M,): each thought's, its random number too.
    """
    parts, size = [], max(128, head.rows)
    for some, numbers in zip(stream.split(size), uniform.split(size), strict=True):
        used, own = some.unique(return_inverse=True)
        parts.append(sample(head(hidden[used])[own], numbers, temperature, top_p, forbid))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts))
