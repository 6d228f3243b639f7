"""Thoughts without sharing, for families whose attention cannot be taken over, and the probe that finds these families.

Every thought is its own row of text here. That is slower, since each step reads the whole text again, but it is exact for
any causal LM: padding behind a row cannot change what comes before it. `PlainSteps` stands in for `StepPass`,
`plain_states` for one packed pass.

The probe compares numbers: some families never call the attention function, others keep a recurrent state or a window
that the function is not told about. It costs a few short forwards, and its outcome is kept per model.
"""

import warnings
import weakref

import torch

from .attention import LanguageHead, backbone, forward, thinking
from .prefix import PrefixPass, StepPass, packed_pass

_ROWS = 32
_TEXT, _THOUGHT = 10, 3
_known = weakref.WeakKeyDictionary()


def plain_rows(base, tokens):
    """Final hidden states (R, L, hidden) of rows of tokens (R, L) padded behind the text."""
    parts = [
        base(input_ids=tokens[i : i + _ROWS], use_cache=False).last_hidden_state for i in range(0, len(tokens), _ROWS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def spliced(ids, row, limit, own):
    """Rows (S, L + W) of text ids[row][:limit] directly followed by own tokens (S, W)."""
    column = torch.arange(ids.shape[1] + own.shape[1], device=ids.device)
    after = column - limit.unsqueeze(1)
    text = ids[row][:, column.clamp(max=ids.shape[1] - 1)]
    return torch.where(after < 0, text, own.gather(1, after.clamp(0, own.shape[1] - 1)))


class PlainSteps:
    """Next tokens of streams; ids (B, L): aligned texts; row, limit (S,): whose text, and how much of it."""

    def __init__(self, ids, row, limit, length):
        self.ids, self.row, self.limit = ids, row, limit
        self.own = ids.new_zeros(len(row), length)
        self.done = 0

    def forward(self, base, tokens, places, width):
        """Hidden states (S * width, hidden) of the next `width` tokens of each stream."""
        self.own[:, self.done : self.done + width] = tokens.view(-1, width)
        self.done += width
        ids = self.ids[:, : int(self.limit.max())]
        states = plain_rows(base, spliced(ids, self.row, self.limit, self.own[:, : self.done]))
        column = self.limit.unsqueeze(1) + torch.arange(self.done - width, self.done, device=ids.device)
        return states[torch.arange(len(states), device=ids.device).unsqueeze(1), column].flatten(0, 1)

    def select(self, streams, row, limit):
        """Keeps (or repeats) the streams in the index tensor; row and limit are theirs."""
        self.own, self.row, self.limit = self.own[streams], row, limit


def plain_states(model, text, text_real, row, limit, own, own_real):
    """Flat states of all texts (R, L), then of all own tokens (S, W), where real; as one packed pass gives them."""
    base = backbone(model)
    states = plain_rows(base, spliced(text, row, limit, own))
    column = (limit.unsqueeze(1) + torch.arange(own.shape[1], device=own.device)).unsqueeze(-1)
    own_states = states.gather(1, column.expand(-1, -1, states.shape[-1]))
    return torch.cat([plain_rows(base, text)[text_real], own_states[own_real]])


def shares_prefix(model):
    """True when thoughts can share the text, False when each needs its own row (slower, with one warning).

    Raises ValueError for a model without a separate head and NotImplementedError for one that is not causal or
    whose logits cannot be reproduced from its final hidden states.
    """
    if model not in _known:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            reason = _reason(model)
        if reason:
            warnings.warn(
                f"{type(model).__name__} cannot share text between thoughts ({reason}); every thought is computed "
                "as its own row, which is exact but slower.",
                stacklevel=3,
            )
        _known[model] = not reason
    return _known[model]


def _reason(model):
    device, base = model.get_input_embeddings().weight.device, backbone(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.get_input_embeddings().weight), (3, _TEXT), generator=generator).to(device)
    limit = torch.tensor([_TEXT // 2, _TEXT], device=device)
    rows = [torch.cat([ids[0, :n], ids[1 + i, :_THOUGHT]]) for i, n in enumerate(limit.tolist())]
    with thinking(model, own_attention=True):
        alone = torch.stack([plain_rows(base, row.unsqueeze(0))[0, -_THOUGHT:] for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence([*rows, ids[2]], batch_first=True)
        beside = plain_rows(base, padded)
        beside = torch.stack([beside[i, n : n + _THOUGHT] for i, n in enumerate(limit.tolist())])
        logits = model(input_ids=rows[0].unsqueeze(0), use_cache=False).logits[0, -_THOUGHT:]
    if _differ(alone, beside):
        raise NotImplementedError(f"{type(model).__name__} is not causal: later tokens change earlier states.")
    if _differ(LanguageHead(model)(alone[0]), logits.to(alone.dtype)):
        raise NotImplementedError(
            f"{type(model).__name__} computes its logits from the final hidden states in a way parallel thoughts "
            "do not know."
        )
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if getattr(model, "_is_stateful", False) or not set(kinds) <= {"full_attention", "sliding_attention"}:
        return "it has layers other than full and sliding attention"
    if not (model._can_set_attn_implementation() and base._can_set_attn_implementation()):
        return "it does not use the attention interface of transformers"
    own, text = ids[1:, :_THOUGHT], torch.arange(_TEXT, device=device)
    row = torch.zeros_like(limit)
    try:
        with thinking(model):
            prefix = PrefixPass()
            forward(base, ids[:1], text.unsqueeze(0), prefix)
            problem = _windows(config, kinds, prefix.rules)
            if problem:
                return problem
            step = StepPass(prefix.keys, row, limit, _THOUGHT)
            stepped = torch.stack([step.forward(base, own[:, t], limit + t, 1) for t in range(_THOUGHT)], 1)
            packed = packed_pass(
                model,
                ids[:1],
                torch.ones_like(ids[:1], dtype=torch.bool),
                row,
                limit,
                own,
                torch.ones_like(own, dtype=torch.bool),
            )[_TEXT:].view_as(stepped)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    if _differ(alone, stepped) or _differ(alone, packed):
        return "the result differs from a plain forward"


def _differ(expected, found):
    # Rounding is ~1e-6 of the spread in float32 and ~1e-2 in bfloat16; a wrong mask is far above.
    tolerance = 1e-4 if torch.finfo(expected.dtype).eps < 1e-6 else 0.1
    spread = (expected - expected.mean()).norm()
    return not (expected - found).norm() <= tolerance * spread


def _windows(config, kinds, rules):
    if len(rules) != config.num_hidden_layers:
        return "its layers do not all call the attention function"
    window = getattr(config, "sliding_window", None)
    sliding = [kind == "sliding_attention" for kind in kinds]
    if not getattr(config, "layer_types", None):
        sliding = [window is not None] * len(rules)
    if [rule.window for rule in rules] != [window if slides else None for slides in sliding]:
        return "its layers do not pass their sliding window to the attention function"
