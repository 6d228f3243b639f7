"""Sampling whose draws are numbered, so that a token does not depend on what is computed beside it.

The uniform number of a draw is a hash of (seed, row, position, thought, step). Batches can be cut, sorted and compacted
at will, and the same thought comes out. Tokens are drawn by inverting the cumulative distribution, which on a CPU is
about 20 times cheaper than ``torch.multinomial`` or Gumbel noise over the vocabulary.
"""

import math

import torch

_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BLOCK = 64


def _shift(x, bits):
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x):
    # The 64-bit finaliser of SplitMix64 (Steele, Lea and Flood 2014). Int64 products wrap around.
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def draw_seed(generator=None):
    """Return one seed in [0, 2**62) from a ``torch.Generator``, or from the global one."""
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**62, (), generator=generator, device=device))


def uniforms(seed, rows, positions, thoughts, steps):
    """Return uniform numbers in [0, 1) (S, steps), float32, for S streams named by three LongTensors (S,)."""
    key = torch.full_like(rows, seed)
    for part in (rows, positions, thoughts):
        key = _mix(key + (part + 1) * _STEP)
    step = torch.arange(1, steps + 1, device=rows.device) * _STEP
    return _shift(_mix(_mix(key.unsqueeze(1) + step)), 40).float() / 2**24


def forbidden(ids, size, device):
    """Return the distinct ids as a LongTensor, or None if there are none. Raises ``ValueError`` outside [0, size)."""
    ids = sorted({int(i) for i in ids})
    if ids and not 0 <= ids[0] <= ids[-1] < size:
        raise ValueError(f"Forbidden token ids must lie in [0, {size}), not {ids[0]}..{ids[-1]}.")
    return torch.tensor(ids, device=device) if ids else None


def _invert(weights, mass):
    # The first index whose cumulative weight exceeds `mass`, with mass kept below the total so that there is one.
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    mass = torch.minimum(mass, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(1)
    return torch.searchsorted(cumulative, mass, right=True), cumulative, mass


def _invert_blocks(weights, uniform):
    count = weights.shape[1] // _BLOCK
    sums = weights[:, : count * _BLOCK].unflatten(1, (count, _BLOCK)).sum(-1)
    if weights.shape[1] % _BLOCK:
        sums = torch.cat([sums, weights[:, count * _BLOCK :].sum(-1, keepdim=True)], 1)
    block, cumulative, mass = _invert(sums, uniform * sums.sum(-1))
    before = (cumulative - sums).gather(1, block)
    index = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = index < weights.shape[1]
    near = weights.gather(1, index.clamp(max=weights.shape[1] - 1)) * inside
    return block * _BLOCK + _invert(near, (mass - before).clamp(min=0).squeeze(1))[0]


def _nucleus(weights, top_p):
    """Zero weights (S, V) outside the smallest set of most likely tokens whose share reaches ``top_p``."""
    ordered, order = weights.sort(-1, descending=True)
    share = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter_(1, order, ordered.masked_fill_(share >= top_p, 0))


def sample(logits, uniform, temperature=1.0, top_p=1.0, forbid=None):
    """Draw one token per row of logits (S, V), which are overwritten, from uniform numbers (S,).

    Returns tokens (S,) and log-probs (S,). ``temperature`` 0 takes the most likely token. ``forbid``: LongTensor of
    tokens that get no probability, or None. The log-probs are those at this temperature (at 1 if it is 0) without the
    forbidden tokens, and **before** ``top_p`` cuts the distribution, so that re-scoring gives the same numbers.
    """
    if forbid is not None:
        logits.index_fill_(1, forbid, -math.inf)
    if temperature not in (0, 1):
        logits.div_(temperature)
    if temperature == 0:
        tokens = logits.argmax(-1)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    total = weights.sum(-1)
    if temperature != 0:
        drawn = _nucleus(weights, top_p) if top_p < 1 else weights
        uniform = uniform.to(weights.dtype)
        many = weights.shape[1] > 8 * _BLOCK
        tokens = _invert_blocks(drawn, uniform) if many else _invert(drawn, uniform * drawn.sum(-1))[0]
        tokens = tokens.squeeze(1)
    return tokens, (weights.gather(1, tokens.unsqueeze(1)).squeeze(1) / total).log()
