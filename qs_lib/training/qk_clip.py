"""QK-Clip: the largest attention logit of every head, and weights rescaled where it passes a threshold."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from ..errors import UnwatchedError
from . import distributed

NAME = "max_logits"
WATCHES = {}  # attention module -> the watch that is open on its model
QUERY_ROWS = 256  # rows of scores held at a time
QK_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


class Watch:
    """``max_logits`` {layer index: tensor of heads}: the largest since it was cleared. ``layers``: their modules."""

    def __init__(self):
        self.max_logits, self.layers = {}, {}

    @torch.no_grad()
    def record(self, module, query, key, mask, scaling, is_causal):
        """Fold one attention call, query (batch, heads, length, d), into the running maxima."""
        rows, heads = query.shape[2], query.shape[1]
        grouped = query.detach().unflatten(1, (key.shape[1], -1))
        keys = key.detach().unsqueeze(2).mT
        if mask is None and is_causal and rows > 1:
            mask = torch.ones(rows, key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
        largest = torch.full((heads,), -torch.inf, device=query.device)
        for start in range(0, rows, QUERY_ROWS):
            scores = (grouped[:, :, :, start : start + QUERY_ROWS] @ keys).flatten(1, 2).float() * scaling
            if mask is not None:
                part = mask[:, :, start : start + QUERY_ROWS, : key.shape[2]]
                allowed = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
                scores = scores.masked_fill(~allowed, -torch.inf)
            largest = torch.maximum(largest, scores.amax(dim=(0, 2, 3)))
        layer = module.layer_idx
        self.layers[layer] = module
        self.max_logits[layer] = torch.maximum(self.max_logits.get(layer, largest), largest)


@contextmanager
def watch_max_logits(model):
    """Yield a :class:`Watch` that sees every forward pass of ``model``.

        with watch_max_logits(model) as watch:
            model(input_ids)
        watch.max_logits            # {layer index: tensor of heads}

    The logit is scaling * q.k before the softmax, over all allowed (query, key) pairs of all calls. Every pass counts,
    so keep a teacher's passes outside. The model computes what it computes with "sdpa". Its own attention
    implementations are put back at the end, also after an error. On entry one pass over two tokens checks that every
    attention layer is seen. Raises UnwatchedError where a family bypasses the attention interface or has no "sdpa".
    """
    backbones = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    lacking = [type(m).__name__ for m in backbones if not m._supports_sdpa]
    if lacking:
        unseen = "so its logits cannot be watched: set qk_clip_threshold to 0"
        raise UnwatchedError(f"{lacking[0]} cannot run with sdpa attention, {unseen}")
    numbered = [m for m in model.modules() if hasattr(m, "layer_idx")]
    expected = [m for m in numbered if type(m).__name__.endswith("Attention")]
    if any(m in WATCHES for m in expected):
        raise RuntimeError("this model is already being watched")
    watch, own = Watch(), {id(m.config): (m.config, m.config._attn_implementation) for m in backbones}
    try:
        for config, _ in own.values():
            config._attn_implementation = NAME
        WATCHES.update((m, watch) for m in expected)
        device = next(model.parameters()).device
        # Dropout of the trial pass must not shift the random numbers of the training.
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device))
        if not expected or len(watch.layers) != len(expected):
            called = f"the attention interface was called in {len(watch.layers)} of {len(expected)} attention layers"
            raise UnwatchedError(f"{type(model).__name__}: {called}: set qk_clip_threshold to 0")
        watch.max_logits.clear()
        yield watch
    finally:
        for config, implementation in own.values():
            config._attn_implementation = implementation
        for m in expected:
            WATCHES.pop(m, None)


@contextmanager
def largest_logit(model):
    """Yield a dict that gets the largest attention logit of any head in the passes within, ``max_logit``, at the end.

    It stays empty for a family that cannot be watched. Where the logit runs away, training soon breaks.
    """
    found = {}
    with ExitStack() as stack:
        try:
            watch = stack.enter_context(watch_max_logits(model))
        except UnwatchedError:
            watch = None
        yield found
        if watch is not None:
            found["max_logit"] = max(heads.max().item() for heads in watch.max_logits.values())


def watched_attention(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """transformers' sdpa attention, after showing queries and keys to the open watch."""
    watch = WATCHES.get(module)
    if watch is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        watch.record(module, query, key, attention_mask, scale, causal)
    kwargs |= {"scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# Without its mask function the model would hand over no mask at all and drop padding silently.
ALL_ATTENTION_FUNCTIONS.register(NAME, watched_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@dataclass
class ClipReport:
    """What `clip_heads` saw: the largest logit, the heads above the threshold, and the layers left as they were.

    heads: a list of (layer, head, max logit); report_only: {layer: why its weights were not changed}.
    """

    max_logit: float
    heads: list = field(default_factory=list)
    report_only: dict = field(default_factory=dict)


@torch.no_grad()
def clip_heads(watch, threshold):
    """QK-Clip (Kimi K2, arXiv 2507.20534): bring every head whose largest logit S_h passes tau = `threshold` to tau.

    g_h = min(1, tau / S_h) is put on the query and key projections, biases included, so that all logits of head h are
    multiplied by g_h. With one key head per query head both get sqrt(g_h), as in the paper. Where query heads share a
    key head the paper has no rule; here the key takes only what all its heads have in common and each query the rest:

        k *= sqrt(max_h g_h),   q_h *= g_h / sqrt(max_h g_h)

    which is exact for every head and leaves heads below tau bit-equal. It rescales weights after the optimizer step;
    scores and updates are never clamped, momentum is not touched. Several processes share their maxima first.

    Only a report is made where rescaling is not exact: models that normalise queries and keys, fused or compressed
    projections other than GPT-2's, and adapters on the projections.
    """
    report = ClipReport(max_logit=-torch.inf)
    for layer, largest in sorted(watch.max_logits.items()):
        largest = distributed.total(largest, "MAX")
        maxima = largest.tolist()
        report.max_logit = max(report.max_logit, *maxima)
        above = [(layer, head, value) for head, value in enumerate(maxima) if value > threshold]
        report.heads += above
        if above and (reason := obstacle(watch.layers[layer], len(maxima))):
            report.report_only[layer] = reason
        elif above:
            factors = torch.where(largest > threshold, threshold / largest, 1.0)  # exactly 1 at the threshold too
            rescale(watch.layers[layer], factors)
    return report


def obstacle(module, heads):
    """Why the heads of this attention module cannot be rescaled exactly, or None."""
    if any(getattr(module, name, None) is not None for name in QK_NORMS):
        return "queries or keys are normalised"
    if hasattr(module, "c_attn"):
        whole = type(module.c_attn) is Conv1D and module.c_attn.nf == 3 * heads * module.head_dim
        return None if whole else "projections carry an adapter or are unknown"
    if not hasattr(module, "q_proj") or not hasattr(module, "k_proj"):
        return "no separate query and key projections"
    if type(module.q_proj) is not torch.nn.Linear or type(module.k_proj) is not torch.nn.Linear:
        return "projections carry an adapter or are quantized"
    return None if module.q_proj.out_features == heads * module.head_dim else "queries are projected with more"


def rescale(module, factors):
    """Multiply all logits of head h by factors[h]."""
    d = module.head_dim
    if hasattr(module, "c_attn"):  # GPT-2's Conv1D: queries, keys, values side by side in the columns
        width = d * len(factors)
        both = (module.c_attn.weight, module.c_attn.bias)
        queries, keys = [t[..., :width] for t in both], [t[..., width : 2 * width] for t in both]
    else:
        both = (module.q_proj, module.k_proj)
        queries, keys = ([p.weight.T] if p.bias is None else [p.weight.T, p.bias] for p in both)
    grouped = factors.view(keys[0].shape[-1] // d, -1)
    root = grouped.amax(dim=1, keepdim=True).sqrt()
    for tensors, scale in ((queries, (grouped / root).flatten()), (keys, root.flatten())):
        for tensor in tensors:
            tensor.mul_(scale.repeat_interleave(d).to(tensor))
