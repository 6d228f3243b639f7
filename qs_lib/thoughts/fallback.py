"""Thoughts without sharing, for families whose attention cannot be taken over, and the probes that find them.

Every thought is its own row of text here. That is slower, since each step reads the whole text again, but exact for any
causal LM: padding behind a row cannot change what comes before it. The probes compare numbers, since some families
never call the attention function, and others keep a recurrent state or a window that the function is not told about.
They cost a few short forwards, also around the lengths at which a family changes, and are kept per model.
"""

import threading
import warnings
import weakref
from functools import partial

import torch
from transformers import DynamicCache

from ..errors import WorkbookError
from .attention import LanguageHead, backbone, forward, view
from .prefix import Packed, PrefixPass, StepPass, packed_states

_ROWS = 32
_TEXT, _THOUGHT = 10, 3
_LIMITS = "max_position_embeddings", "original_max_position_embeddings"
_known = weakref.WeakKeyDictionary()
_one_at_a_time = threading.RLock()


def _row_states(base, tokens):
    """Return final hidden states (R, L, hidden) of rows of tokens (R, L) padded behind the text."""
    parts = [base(input_ids=some, use_cache=False).last_hidden_state for some in tokens.split(_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def padded_states(base, ids, mask):
    """Return final hidden states (R, L, hidden) of rows padded on any side, each read as a text alone: 0 at padding."""
    real = mask.bool()
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    states = _row_states(base, ids.gather(1, order))
    index = order.unsqueeze(-1).expand_as(states)
    return states.new_zeros(*ids.shape, states.shape[-1]).scatter(1, index, states) * real.unsqueeze(-1)


def spliced(ids, row, limit, own):
    """Return rows (S, L + W) of text ``ids[row][:limit]`` directly followed by own tokens (S, W)."""
    column = torch.arange(ids.shape[1] + own.shape[1], device=ids.device)
    after = column - limit.unsqueeze(1)
    text = ids[row][:, column.clamp(max=ids.shape[1] - 1)]
    return torch.where(after < 0, text, own.gather(1, after.clamp(0, own.shape[1] - 1)))


class PlainSteps:
    """Stands in for ``StepPass``. ``ids`` (B, L): aligned texts. ``row``, ``limit`` (S,): which, and how much of it."""

    def __init__(self, base, ids, row, limit, length):
        self.base, self.ids, self.row, self.limit = base, ids, row, limit
        self.own = ids.new_zeros(len(row), length)
        self.done = 0

    def forward(self, tokens):
        start, self.done = self.done, self.done + tokens.shape[1]
        self.own[:, start : self.done] = tokens
        ids = self.ids[:, : int(self.limit.max())]
        states = _row_states(self.base, spliced(ids, self.row, self.limit, self.own[:, : self.done]))
        column = self.limit.unsqueeze(1) + torch.arange(start, self.done, device=ids.device)
        return states[torch.arange(len(states), device=ids.device).unsqueeze(1), column]

    def select(self, streams):
        self.own, self.row, self.limit = self.own[streams], self.row[streams], self.limit[streams]


def plain_states(base, packed):
    """Return flat states of all real text tokens, then of all real own tokens, as ``packed_states`` does."""
    text, own, real = packed.text, packed.own, packed.own_real
    most = int((packed.limit + real.sum(1)).max())  # padding alone may not lie beyond the model's last position
    states = _row_states(base, spliced(text, packed.row, packed.limit, own)[:, :most])
    places = packed.own_places().clamp(max=most - 1)
    own_states = states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    text_real = packed.text_real[:, : int(packed.text_real.sum(1).max())]
    return torch.cat([_row_states(base, text[:, : text_real.shape[1]])[text_real], own_states[real]])


def _once(model, probe):
    """Return ``probe(model)``, found once per model, in float32 precision and without gradients."""
    with _one_at_a_time, torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        known = _known.setdefault(model, {})
        if probe not in known:
            known[probe] = probe(model)
        return known[probe]


def shares_prefix(model):
    """Tell whether thoughts can share the text. If not, each needs its own row (slower, with one warning).

    Raises ``ValueError`` if the model has no separate head, ``WorkbookError`` if its states are not finite,
    ``NotImplementedError`` if it is not causal or its logits cannot be reproduced from its final hidden states.
    """
    return _once(model, _shares)


def _shares(model):
    reason = _reason(model)
    if reason:
        slower = "every thought is computed as its own row, which is exact but slower."
        warnings.warn(f"{type(model).__name__} cannot share text between thoughts ({reason}); {slower}", stacklevel=5)
    return not reason


def _reason(model):
    """Return why thoughts cannot share the text, or None."""
    ids = _words(model)
    limit = torch.tensor([_TEXT // 2, _TEXT], device=ids.device)
    alone = _states_alone(view(model, own_attention=True), ids, limit)
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    if getattr(model, "_is_stateful", False) or not set(kinds) <= {"full_attention", "sliding_attention"}:
        return "it has layers other than full and sliding attention"
    if not (model._can_set_attn_implementation() and backbone(model)._can_set_attn_implementation()):
        return "it does not use the attention interface of transformers"
    windows = [None if kind == "full_attention" else window for kind in kinds]
    own, text = ids[1:, :_THOUGHT], torch.arange(_TEXT, device=ids.device)
    row, real = torch.zeros_like(limit), torch.ones_like(ids, dtype=torch.bool)
    try:
        base, prefix = backbone(view(model)), PrefixPass()
        forward(base, ids[:1], text.unsqueeze(0), prefix)
        if len(prefix.rules) != config.num_hidden_layers:
            return "its layers do not all call the attention function"
        if [rule.window for rule in prefix.rules] != windows:
            return "its layers do not pass their sliding window to the attention function"
        step = StepPass(base, prefix.keys, row, limit, _THOUGHT)
        stepped = torch.cat([step.forward(own[:, t : t + 1]) for t in range(_THOUGHT)], 1)
        packed = packed_states(base, Packed(ids[:1], real[:1], row, limit, own, real[1:, :_THOUGHT]))[_TEXT:]
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    if _differ(alone, stepped) or _differ(alone, packed.view_as(stepped)):
        return "the result differs from a plain forward"


def _words(model):
    """Return random token ids (3, _TEXT) to probe with."""
    weight, generator = model.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    return torch.randint(len(weight), (3, _TEXT), generator=generator).to(weight.device)


def _states_alone(model, ids, limit):
    """Return the states (2, _THOUGHT, hidden) of two thoughts, each in its own row, once padding proves harmless."""
    base = backbone(model)
    rows = [torch.cat([ids[0, :n], ids[1 + i, :_THOUGHT]]) for i, n in enumerate(limit.tolist())]
    alone = torch.stack([_row_states(base, row.unsqueeze(0))[0, -_THOUGHT:] for row in rows])
    beside = _row_states(base, torch.nn.utils.rnn.pad_sequence([*rows, ids[2]], batch_first=True))
    beside = torch.stack([beside[i, n : n + _THOUGHT] for i, n in enumerate(limit.tolist())])
    logits = model(input_ids=rows[0].unsqueeze(0), use_cache=False).logits[0, -_THOUGHT:]
    if not alone.isfinite().all():
        raise WorkbookError(f"{type(model).__name__} computes NaN or infinity: its weights are broken, load others")
    if _differ(alone, beside):
        raise NotImplementedError(f"{type(model).__name__} is not causal: later tokens change earlier states.")
    if _differ(LanguageHead(model)(alone[0]), logits.to(alone.dtype)):
        reason = "computes its logits from the final hidden states in a way parallel thoughts do not know."
        raise NotImplementedError(f"{type(model).__name__} {reason}")
    return alone


def _differ(expected, found):
    # Rounding is ~1e-6 of the spread in float32 and ~1e-2 in bfloat16. A wrong mask is far above.
    exact = torch.finfo(expected.dtype).eps < 1e-6 and not _rounds_products(expected)
    spread = (expected - expected.mean()).norm()
    return not (expected - found).norm() <= (1e-4 if exact else 0.1) * spread


def _rounds_products(like):
    """Tell whether float32 matrices are multiplied in less than float32 here, as with TF32 on a GPU."""
    numbers = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    product, given = numbers.double() @ numbers.double(), numbers.to(like.device)
    return ((given @ given).cpu() - product).norm() > 1e-5 * product.norm()


def check_room(model, text, more=0):
    """Raise ``WorkbookError`` if ``text`` tokens and ``more`` behind them are more than the model can read."""
    most = _once(model, _room)
    if most is not None and text + more > most:
        sentence = f"a text of {text} tokens leaves no room for thoughts among the model's {most} positions"
        raise WorkbookError(f"{sentence}: shorten the text or thought_length")


def _room(model):
    """Return how many tokens the model reads, None if there is no end.

    A table of positions ends. Rotary embeddings that depend on the length of the text change what was read before.
    """
    config = model.config.get_text_config()
    most = getattr(config, _LIMITS[0], None)
    if most and _has_table(model, most):
        return most
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [vars(config), ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    limits = {limit for rope in ropes for name in _LIMITS if 0 < (limit := rope.get(name) or 0) < 2**31}
    base, ids = backbone(view(model, own_attention=True)), _words(model)[:1, :6]
    try:
        for limit in [0, *sorted(limits)]:  # at 0 frequencies of a longer text are forgotten
            places = torch.arange(6, device=ids.device).unsqueeze(0) + max(0, limit - 3)
            some, more = (base(input_ids=ids[:, :n], position_ids=places[:, :n])[0][:, :3] for n in (3, 6))
            if limit and _differ(some, more):
                return limit - 1  # at the limit itself the frequencies of a longer text may still be in use
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return None
    return None


def _has_table(model, most):
    """Tell whether the model keeps a row for each of ``most`` positions. Some tables have a few rows more."""
    words = model.get_input_embeddings()
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
    tables += [x for m in model.modules() for x in (m._buffers | vars(m)).values() if isinstance(x, torch.Tensor)]
    return any(most <= size < most + 4 for x in tables if x.dim() > 1 for size in (len(x), x.shape[-2]))


def new_cache(model):
    """Return an empty cache from which the model goes on exactly in left-padded rows, or None if there is none."""
    make = _once(model, _cache)
    return make and make()


def _cache(model):
    config = model.config.get_text_config()
    return next((make for make in (DynamicCache, partial(DynamicCache, config=config)) if _goes_on(model, make)), None)


def _goes_on(model, make):
    """Tell whether two left-padded rows, read in three pieces and swapped between them, equal each row alone."""
    base, ids = backbone(view(model, own_attention=True)), _words(model)[:2, :8]
    mask, swap, parts = torch.ones_like(ids), torch.tensor([1, 0], device=ids.device), []
    mask[0, :3] = 0
    expected = padded_states(base, ids, mask)
    try:
        cache = make()
        for start, stop in ((0, 6), (6, 7), (7, 8)):
            parts.append(masked_states(base, ids[:, start:stop], mask[:, :stop], cache=cache))
            cache.reorder_cache(swap)
            ids, mask = ids[swap], mask[swap]
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
        return False
    found = torch.cat([parts[0], parts[1][swap], parts[2]], 1)
    real = mask[swap].bool()
    return found.shape == expected.shape and not _differ(expected[real], found[real])


def masked_states(base, ids, mask=None, cache=None):
    """Return final hidden states (R, new tokens, hidden) of one pass. ``mask`` covers the tokens in ``cache`` too."""
    places = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    text = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    return base(**text, past_key_values=cache, use_cache=cache is not None).last_hidden_state
