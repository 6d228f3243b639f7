"""Thoughts without sharing, for families whose attention cannot be taken over, and the probe that finds them.

Every thought is its own row of text here. That is slower, since each step reads the whole text again, but exact for any
causal LM: padding behind a row cannot change what comes before it. The probe compares numbers, since some families
never call the attention function, and others keep a recurrent state or a window that the function is not told about.
It costs a few short forwards, and its outcome is kept per model.
"""

import warnings
import weakref

import torch

from .attention import LanguageHead, backbone, forward, thinking
from .prefix import Packed, PrefixPass, StepPass, packed_states

_ROWS = 32
_TEXT, _THOUGHT = 10, 3
_known = weakref.WeakKeyDictionary()


def _row_states(base, tokens):
    """Return final hidden states (R, L, hidden) of rows of tokens (R, L) padded behind the text."""
    parts = [base(input_ids=some, use_cache=False).last_hidden_state for some in tokens.split(_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
        """Return hidden states (S, W, hidden) of the next tokens (S, W) of each stream."""
        start, self.done = self.done, self.done + tokens.shape[1]
        self.own[:, start : self.done] = tokens
        ids = self.ids[:, : int(self.limit.max())]
        states = _row_states(self.base, spliced(ids, self.row, self.limit, self.own[:, : self.done]))
        column = self.limit.unsqueeze(1) + torch.arange(start, self.done, device=ids.device)
        return states[torch.arange(len(states), device=ids.device).unsqueeze(1), column]

    def select(self, streams):
        """Keep (or repeat) the streams in the index tensor."""
        self.own, self.row, self.limit = self.own[streams], self.row[streams], self.limit[streams]


def plain_states(base, packed):
    """Return flat states of all real text tokens, then of all real own tokens, as ``packed_states`` does."""
    states = _row_states(base, spliced(packed.text, packed.row, packed.limit, packed.own))
    own_states = states.gather(1, packed.own_places().unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return torch.cat([_row_states(base, packed.text)[packed.text_real], own_states[packed.own_real]])


def shares_prefix(model):
    """Tell whether thoughts can share the text. If not, each needs its own row (slower, with one warning).

    Raises ``ValueError`` if the model has no separate head, ``NotImplementedError`` if it is not causal or its logits
    cannot be reproduced from its final hidden states.
    """
    if model not in _known:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            reason = _reason(model)
        if reason:
            slower = "every thought is computed as its own row, which is exact but slower."
            name = type(model).__name__
            warnings.warn(f"{name} cannot share text between thoughts ({reason}); {slower}", stacklevel=3)
        _known[model] = not reason
    return _known[model]


def _reason(model):
    """Return why thoughts cannot share the text, or None."""
    device, base = model.get_input_embeddings().weight.device, backbone(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.get_input_embeddings().weight), (3, _TEXT), generator=generator).to(device)
    limit = torch.tensor([_TEXT // 2, _TEXT], device=device)
    alone = _states_alone(model, base, ids, limit)
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    if getattr(model, "_is_stateful", False) or not set(kinds) <= {"full_attention", "sliding_attention"}:
        return "it has layers other than full and sliding attention"
    if not (model._can_set_attn_implementation() and base._can_set_attn_implementation()):
        return "it does not use the attention interface of transformers"
    windows = [None if kind == "full_attention" else window for kind in kinds]
    own, text = ids[1:, :_THOUGHT], torch.arange(_TEXT, device=device)
    row, real = torch.zeros_like(limit), torch.ones_like(ids, dtype=torch.bool)
    try:
        with thinking(model):
            prefix = PrefixPass()
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


def _states_alone(model, base, ids, limit):
    """Return the states (2, _THOUGHT, hidden) of two thoughts, each in its own row, once padding proves harmless."""
    rows = [torch.cat([ids[0, :n], ids[1 + i, :_THOUGHT]]) for i, n in enumerate(limit.tolist())]
    with thinking(model, own_attention=True):
        alone = torch.stack([_row_states(base, row.unsqueeze(0))[0, -_THOUGHT:] for row in rows])
        beside = _row_states(base, torch.nn.utils.rnn.pad_sequence([*rows, ids[2]], batch_first=True))
        beside = torch.stack([beside[i, n : n + _THOUGHT] for i, n in enumerate(limit.tolist())])
        logits = model(input_ids=rows[0].unsqueeze(0), use_cache=False).logits[0, -_THOUGHT:]
    if _differ(alone, beside):
        raise NotImplementedError(f"{type(model).__name__} is not causal: later tokens change earlier states.")
    if _differ(LanguageHead(model)(alone[0]), logits.to(alone.dtype)):
        reason = "computes its logits from the final hidden states in a way parallel thoughts do not know."
        raise NotImplementedError(f"{type(model).__name__} {reason}")
    return alone


def _differ(expected, found):
    # Rounding is ~1e-6 of the spread in float32 and ~1e-2 in bfloat16. A wrong mask is far above.
    tolerance = 1e-4 if torch.finfo(expected.dtype).eps < 1e-6 else 0.1
    spread = (expected - expected.mean()).norm()
    return not (expected - found).norm() <= tolerance * spread
