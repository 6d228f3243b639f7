"""Attention that reports its log-sum-exp, and the hook that puts it into any Hugging Face causal LM.

A thought token attends to two sets of keys: the text before the thought, which all thoughts share, and the
thought's own tokens. Each set is attended to on its own, and the two results are merged exactly by their
log-sum-exp (LSE). Quiet-STaR (arXiv 2403.09629, section 4.2 and figure 3) writes the same rule as one dense
"diagonal" mask over the text and all thoughts. Nothing here has that size.

Shapes: R rows, H query heads, Hkv key heads (H a multiple of Hkv), Q queries, K keys, D head size.
"""

import math
import threading
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from types import MethodType
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

_NAME = "parallel_thoughts_without_mask"  # transformers makes no mask for a name that has no mask function
_CPU_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_CPU_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_CAUSAL_BLOCK = 128
_LOGIT_NUMBERS = 8_000_000  # how many logits are made at once
_FEW_QUERIES = 8  # below this many per row the fused kernel is slower than two matrix products
_local = threading.local()


class Rule(NamedTuple):
    """How one layer scores a key: scale, sliding window in tokens, soft cap, attention sinks (H,)."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def _fused(query, rule):
    return query.device.type == "cpu" and rule.softcap is None and _CPU_FLASH is not None


def _fold(x, heads):
    """(R, H, Q, ...) to (R, Hkv, Q H / Hkv, ...): the query heads that share a key head are more queries of it."""
    return x.unflatten(1, (heads, -1)).flatten(2, 3)


def _unfold(x, groups):
    """The inverse of ``_fold``, for groups = H / Hkv."""
    return x.unflatten(2, (groups, -1)).flatten(1, 2)


def _scores(query, key, rule, mask, causal):
    """Scores (R, H, Q, K), and the slope of their soft cap or None."""
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    scores = _unfold(torch.matmul(_fold(query, heads), key.transpose(-1, -2)), groups) * rule.scale
    slope = None
    if rule.softcap is not None:
        tanh = torch.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * tanh, 1 - tanh * tanh
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores, slope


def attend(query, key, value, rule, mask=None, causal=False):
    """Return softmax attention of query (R, H, Q, D) over key, value (R, Hkv, K, D): output like query, LSE (R, H, Q).

    ``mask`` is additive. ``rule`` gives scale and soft cap: its window belongs in the mask, its sinks are left out.
    For a query that sees no key both results are undefined, and the caller overwrites them.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if _fused(query, rule) and (query.shape[2] > _FEW_QUERIES or query.dtype != wide):
        return _CPU_FLASH(query, key, value, 0.0, causal, attn_mask=mask, scale=rule.scale)
    scores, _ = _scores(query.to(wide), key.to(wide), rule, mask, causal)
    weights = scores.softmax(-1)
    lse = scores.amax(-1) - weights.amax(-1).log()
    output = torch.matmul(_fold(weights, key.shape[1]).to(value.dtype), value)
    return _unfold(output, query.shape[1] // key.shape[1]), lse


def attend_grads(grad, query, key, value, output, lse, rule, mask=None, causal=False):
    """Return the gradients of ``attend`` for query, key and value, given a *merged* output and LSE.

    With the output and LSE of the whole attention (all key sets together) this is the exact share of this key
    set. The weights are exp(score - LSE), and the softmax term sum(grad * output) is global.
    """
    if _fused(query, rule):
        return _CPU_FLASH_BACKWARD(grad, query, key, value, output, lse, 0.0, causal, attn_mask=mask, scale=rule.scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    q, k, v, g = (x.to(wide) for x in (query, key, value, grad))
    scores, slope = _scores(q, k, rule, mask, causal)
    weights = (scores - lse.unsqueeze(-1)).exp()
    delta = (g * output.to(wide)).sum(-1, keepdim=True)
    grad_weights = _unfold(torch.matmul(_fold(g, heads), v.transpose(-1, -2)), groups)
    grad_scores = weights * (grad_weights - delta) * rule.scale
    if slope is not None:
        grad_scores = grad_scores * slope
    grad_scores, weights = _fold(grad_scores, heads), _fold(weights, heads)
    grad_query = _unfold(torch.matmul(grad_scores, k), groups).to(query.dtype)
    grad_key = torch.matmul(grad_scores.transpose(-1, -2), _fold(q, heads)).to(key.dtype)
    return grad_query, grad_key, torch.matmul(weights.transpose(-1, -2), _fold(g, heads)).to(value.dtype)


def key_mask(limits, places, window, start, stop, dtype):
    """Return an additive mask (R, 1, Q, stop - start) and, with a window, which queries see no key (R, 1, Q).

    A query sees key j when j < limit and j > place - window. ``limits``, ``places`` (R, Q): key counts and positions.
    """
    index = torch.arange(start, stop, device=limits.device)
    seen = index < limits[:, None, :, None]
    blind = None
    if window is not None:
        seen = seen & (index > places[:, None, :, None] - window)
        blind = ~seen.any(-1)
    zero = torch.zeros((), dtype=dtype, device=limits.device)
    return torch.where(seen, zero, zero - math.inf), blind


def _causal_blocks(length, rule, query):
    """Cut plain causal attention: slices of queries and of keys, a mask, and whether the kernel makes the mask."""
    whole = rule.window is None or rule.window >= length
    if whole and _fused(query, rule):
        return [(slice(0, length), slice(0, length), None, True)]
    places = torch.arange(length, device=query.device).unsqueeze(0)
    blocks = []
    for start in range(0, length, _CAUSAL_BLOCK):
        stop = min(start + _CAUSAL_BLOCK, length)
        first = 0 if whole else max(0, start - rule.window + 1)
        here = places[:, start:stop]
        mask, _ = key_mask(here + 1, here, None if whole else rule.window, first, stop, query.dtype)
        blocks.append((slice(start, stop), slice(first, stop), mask, False))
    return blocks


def causal_attend(query, key, value, rule):
    """Return plain causal attention of rows with themselves, sinks left out: output (R, H, L, D), LSE (R, H, L)."""
    parts = [
        attend(query[:, :, own], key[:, :, seen], value[:, :, seen], rule, mask, causal)
        for own, seen, mask, causal in _causal_blocks(query.shape[2], rule, query)
    ]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part, 2) for part in zip(*parts))


def causal_attend_grads(grad, query, key, value, output, lse, rule):
    """Return the gradients of ``causal_attend`` for query, key and value under a merged output and LSE."""
    blocks = _causal_blocks(query.shape[2], rule, query)
    if len(blocks) == 1:
        return attend_grads(grad, query, key, value, output, lse, rule, *blocks[0][2:])
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for own, seen, mask, causal in blocks:
        g, q, o, l = (x[:, :, own] for x in (grad, query, output, lse))
        part = attend_grads(g, q, key[:, :, seen], value[:, :, seen], o, l, rule, mask, causal)
        grads[0][:, :, own] = part[0]
        grads[1][:, :, seen] += part[1]
        grads[2][:, :, seen] += part[2]
    return grads


def merge(output, lse, other_output, other_lse):
    """Return attention over the union of two disjoint key sets from their outputs (..., D) and LSEs (...)."""
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1).to(output.dtype)
    return torch.lerp(output, other_output.to(output.dtype), share), torch.logaddexp(lse, other_lse)


def add_sinks(output, lse, sinks):
    """Let sinks (H,) take their share of the weights: output (..., H, D) and LSE (..., H) after it."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype))
    return output * (lse - total).exp().unsqueeze(-1).to(output.dtype), total


def thoughts_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Return the attention of one layer as transformers asks for it: query (B, H, Q, D) in, (B, Q, H, D) out.

    The work in progress in this thread does it. Raises ``NotImplementedError`` for a position bias and for a mask.
    """
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} makes a mask of its own.")
    if options.get("position_bias") is not None:
        bias = "adds a position bias to its attention scores, which parallel thoughts do not support."
        raise NotImplementedError(f"{type(module).__name__} {bias}")
    size, value_size, device = query.shape[-1], value.shape[-1], query.device.type
    if torch.is_autocast_enabled(device):  # of the three only values come from a cast product as they are
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if value_size != size:
        wide = max(size, value_size)
        query, key, value = (pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    window, softcap, sinks = (options.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    rule = Rule(size**-0.5 if scaling is None else scaling, window, softcap, sinks)
    with torch.autocast(device, enabled=False):
        return _local.work.layer(query, key, value, rule)[..., :value_size].contiguous(), None


AttentionInterface.register(_NAME, thoughts_attention)


def backbone(model):
    """Return the part of a causal LM below its head. Raises ``ValueError`` if the model has no such part."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's base_model is another thing
    base = getattr(model, "base_model", model)
    base = model.get_decoder() if base is model else base
    if base is None or base is model or model.get_output_embeddings() is None:
        need = "parallel thoughts need one (for example from AutoModelForCausalLM)."
        raise ValueError(f"{type(model).__name__} is not a causal language model with a separate head; {need}")
    return base


def view(model, own_attention=False):
    """Return a copy of the model without dropout that shares its parameters. ``forward`` needs one.

    It has modules and configurations of its own, so that passes leave no trace in the model, and other threads may use
    the model meanwhile. With ``own_attention`` it computes as the model does. Raises ``NotImplementedError`` for RWKV
    where it rescales its weights in place.
    """
    copies, config = {}, model.config.get_text_config()
    if 0 < getattr(config, "rescale_every", 0) < config.num_hidden_layers:
        name = type(model).__name__
        raise NotImplementedError(f"{name} rescales its weights to evaluate: load it with rescale_every=0.")

    def viewed(old):
        if old is None or id(old) in copies:
            return copies.get(id(old))
        new = copies[id(old)] = object.__new__(type(old))
        fields = vars(new)
        for name, value in vars(old).items():
            if isinstance(value, PreTrainedConfig):
                if id(value) not in copies:
                    copies[id(value)] = copy(value)
                    if not own_attention:
                        vars(copies[id(value)])["_attn_implementation_internal"] = _NAME
                value = copies[id(value)]
            elif isinstance(value, partial) and old in value.args:  # so do tools that put a forward of their own
                value = partial(value.func, *(new if x is old else x for x in value.args), **value.keywords)
            elif isinstance(value, MethodType) and value.__self__ is old:
                value = MethodType(value.__func__, new)
            fields[name] = value
        fields["training"] = False
        # Rotary embeddings overwrite their frequencies in place.
        small = {name: x.clone() for name, x in old._buffers.items() if x is not None and x.dim() < 2}
        fields["_buffers"] = old._buffers | small
        fields["_modules"] = {name: viewed(module) for name, module in old._modules.items()}
        return new

    return viewed(model)


@contextmanager
def _at_work(work):
    _local.work = work
    try:
        yield
    finally:
        _local.work = None


def forward(base, input_ids, position_ids, work):
    """Return final hidden states (B, Q, hidden) of a pass in which ``work.layer`` does the attention of each layer.

    ``base`` is the backbone of a ``view``. Layers with gradient checkpointing (``recompute_layers``) keep only what
    goes into them, and are run again in the backward pass. A differentiable pass needs a view for itself.
    """
    if torch.is_grad_enabled():
        # transformers checkpoints in training mode only, and its backward pass would not find `work`.
        settings = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _at_work(work))}
        for layer in base.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.forward = partial(checkpoint, layer.forward, **settings)
    with _at_work(work):
        return base(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


def recompute_layers(model):
    """Turn gradient checkpointing on, in the model's own passes in training mode and in those of thoughts."""
    renamed = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})


class LanguageHead:
    """From final hidden states (..., hidden) to the float32 (or float64) logits that the model's own head computes."""

    def __init__(self, model):
        config = model.config.get_text_config()
        self.head = model.get_output_embeddings()
        weight = getattr(self.head, "original_module", self.head).weight  # asked for its own, peft copies it all
        self.size, self.width = weight.shape  # width: of the final states, in some families not hidden_size
        self.dtype = weight.dtype
        self.rows = max(1, _LOGIT_NUMBERS * (16 if weight.is_cuda else 1) // self.size)  # of logits made at once
        self.divide = getattr(config, "logits_scaling", None)
        self.multiply = getattr(config, "logit_scale", None)
        self.cap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden, forbid=None):
        """Return logits (..., V), -inf for the ids in the tensor ``forbid``."""
        logits = self.head(hidden.to(self.dtype))
        if self.divide is not None:
            logits = logits / self.divide
        if self.multiply is not None:
            logits = logits * self.multiply
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if forbid is None else logits.index_fill_(-1, forbid, -math.inf)  # ours alone
