"""Muon x Grokfast: Muon on hidden matrices, AdamW on the rest, one slow-gradient filter before both."""

import math

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..errors import TrainingError
from ..settings import unknown_name
from .qk_clip import clip_heads

# Names of an output layer in models that have no get_output_embeddings().
HEAD_NAMES = {"lm_head", "embed_out", "unembed", "head", "classifier", "score"}
# Where bfloat16 has a unit of its own, matrices whose smaller side reaches this are 2 to 5 times faster in it. With
# "avx512_bf16" alone they take 1.8 times as long (Xeon, torch 2.13).
FLOAT32_BELOW = 64
CPU_FEATURES = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: none known, so float32
FAST_BF16 = any(CPU_FEATURES.get(name) for name in ("amx_bf16", "bf16"))
# Equal shapes are orthogonalised together, up to this many numbers at a time.
BATCH_NUMEL = 1 << 24


def split_parameters(model):
    """Split the trainable parameters of `model` into Muon's and AdamW's, as two lists of (name, parameter).

    Muon takes the 2-D hidden matrices (a GPT-2 Conv1D weight is one). AdamW takes all else: embeddings (input,
    position), the output head, whatever an adapter puts into these, gains, biases, tensors that are not 2-D, and
    matrices of one row or column, which are vectors. Of a LoRA pair B goes to Muon and A to AdamW: with B = 0 at
    the start the first gradients of A are noise-sized, and Muon would blow them up to full updates.
    """
    not_hidden = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        if hasattr(model, getter):
            not_hidden.append(getattr(model, getter)())
    not_hidden += [module for name, module in model.named_modules() if name.split(".")[-1] in HEAD_NAMES]
    excluded = {id(p) for module in not_hidden if module is not None for p in module.parameters()}
    hidden, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_hidden = is_matrix(p) and id(p) not in excluded and "lora_A" not in name
            (hidden if is_hidden else rest).append((name, p))
    return hidden, rest


def split_tokens(model, named):
    """Split (name, parameter) pairs: those of embedding and head, and the rest. Raises ``ValueError`` without any."""
    ids = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    tokens = [(n, p) for n, p in named if id(p) in ids or "trainable_tokens_delta" in n]
    if not tokens:
        raise ValueError("token_rows is given, but neither embedding nor output head is trained")
    return tokens, [(n, p) for n, p in named if all(p is not token for _, token in tokens)]


def is_matrix(p):
    return p.ndim == 2 and min(p.shape) > 1


def check_rule(rule: dict) -> None:
    """Check the settings of a parameter group, those that are there. Raises ``ValueError``."""
    function = rule.get("adjust_lr_fn", "original")
    if function not in ("original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn must be 'original' or 'match_rms_adamw', not {function!r}")
    if not all(rule.get(name, 0) >= 0 for name in ("lr", "grokfast_lambda", "weight_decay")):
        raise ValueError("learning rates, grokfast_lambda and weight_decay must not be negative")
    shares = (rule.get("grokfast_alpha", 0), rule.get("momentum", 0), *rule.get("betas", ()))
    if not all(0 <= share < 1 for share in shares):
        raise ValueError("grokfast_alpha, momentum and betas must lie in [0, 1)")
    if not all(rule.get(name) is None or rule[name] > 0 for name in ("eps", "token_scale", "qk_clip_threshold")):
        raise ValueError("eps, token_scale and qk_clip_threshold must be above 0")


def orthogonalize(matrices):
    """Muon's update direction of each matrix of a batch (n, rows, cols), rows <= cols: U S V^T -> about U V^T.

    Five quintic Newton-Schulz steps X <- aX + (bA + cA^2)X with A = X X^T, started from X / ||X||_F (Keller Jordan
    2024). Singular values end between about 0.7 and 1.2, by design not at 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    half = matrices.shape[1] >= FLOAT32_BELOW and (matrices.is_cuda or FAST_BF16)
    x = matrices.to(torch.bfloat16 if half else torch.float32)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonGrokfast(torch.optim.Optimizer):
    """Muon (hidden matrices) and AdamW (all else) behind one Grokfast-EMA filter, in one optimizer.

    Every step, with g the gradient of a parameter p:

        Grokfast   mu <- alpha mu + (1 - alpha) g  (first call: mu = g);   g <- g + lambda mu
        Muon       m <- beta m + (1 - beta) g;  u = (1 - beta) g + beta m;  O = NewtonSchulz5(u)
                   p <- p - lr wd p - lr s O
        AdamW      p <- p - lr wd p - lr m_hat / (sqrt(v_hat) + eps)

    with s = sqrt(max(1, rows / cols)) for adjust_lr_fn="original" (own lr, about 0.02) and s = 0.2 sqrt(max(rows,
    cols)) for "match_rms_adamw" (reuses AdamW's lr). rows x cols is the shape as stored.

    Sources: Muon, Keller Jordan 2024 (``torch.optim.Muon`` is the reference of the tests). "match_rms_adamw",
    Moonlight, arXiv 2502.16982. Grokfast-EMA, arXiv 2405.20233, with mu starting at the first gradient as in the
    authors' code (the printed algorithm starts it at the weights). AdamW, arXiv 1711.05101, torch's fused kernel.
    Deviations: the filter is part of the optimizer, so ``state_dict`` saves mu. Small matrices, and all on a CPU
    where bfloat16 is slower, are orthogonalised in float32. Before Muon the filter is mostly a longer momentum: lambda
    0.1 has the mean lag of beta 0.959.

    ``model_or_params``: a model (parameters routed by :func:`split_parameters`), a list of parameters or (name,
    parameter) pairs (routed by shape alone: every matrix goes to Muon), or a list of torch's parameter groups, dicts
    with such a list as ``params``. What else a group holds (``lr``, ``weight_decay``, ...) replaces the settings of its
    own parameters, Muon's and AdamW's alike. ``add_param_group`` takes such a group too. The optimizer's own groups are
    named: group["name"] is "muon", "adamw" or "tokens". ``grokfast_lambda`` 0 is exactly off and allocates nothing.
    Weight decay is decoupled, by the raw lr, on all parameters. Parameters without a gradient are left alone. Gradient
    clipping is the caller's, before ``step``, hence before the filter. State has the dtype of its parameter. In
    bfloat16 a slow average loses its small steps: train float32 weights, with autocast for speed.

    ``qk_clip_threshold``: after each step QK-Clip (:func:`clip_heads`) brings heads whose largest attention logit
    passed the threshold back to it, and ``clip_report`` says which. Train inside ``with watch_max_logits(model) as
    optimizer.watch:``. ``token_rows``: these rows of the input embedding (and of an untied head) get the learning rate
    adamw_lr x ``token_scale``, in the group "tokens". With an adapter, whose own tensor holds only such rows, they are
    counted in it. Scaling their gradient would do nothing, as Adam divides by its size. Weight decay is not scaled.

    With ``muon`` False AdamW takes all parameters of a model.

    Raises ``ValueError`` on bad settings, and ``TrainingError`` with the names of the tensors if a gradient is not
    finite, before anything has changed.
    """

    watch = None  # an open `watch_max_logits`, needed when qk_clip_threshold is set
    clip_report = None  # what QK-Clip saw and did in the last step

    # As many parameters as the two optimizers have together: their names are those of torch.optim.
    def __init__(
        self,
        model_or_params,
        muon_lr=0.02,
        adamw_lr=3e-4,
        grokfast_lambda=0.1,
        grokfast_alpha=0.98,
        qk_clip_threshold=None,
        weight_decay=0.0,
        momentum=0.95,
        betas=(0.9, 0.95),
        eps=1e-8,
        adjust_lr_fn="original",
        token_rows=None,
        token_scale=1.0,
        muon=True,
    ):
        # "fused" also tells load_state_dict to keep the step counts beside their parameters.
        adam = {"lr": adamw_lr, "betas": betas, "eps": eps, "fused": True}
        self.rules = {"muon": {"lr": muon_lr, "momentum": momentum, "adjust_lr_fn": adjust_lr_fn}, "adamw": adam}
        defaults = {"weight_decay": weight_decay, "qk_clip_threshold": qk_clip_threshold}
        defaults |= {"grokfast_lambda": grokfast_lambda, "grokfast_alpha": grokfast_alpha}
        for rule in self.rules.values():
            check_rule(rule | defaults | {"token_scale": token_scale})
        if isinstance(model_or_params, nn.Module):
            hidden, rest = split_parameters(model_or_params)
            hidden, rest = (hidden, rest) if muon else ([], hidden + rest)
            tokens, rest = ([], rest) if token_rows is None else split_tokens(model_or_params, rest)
            rows = [] if token_rows is None else [int(i) for i in token_rows]
            scaled = {"token_scale": token_scale, "token_rows": rows}
            groups = [
                {"name": "muon", "params": hidden, **self.rules["muon"]},
                {"name": "adamw", "params": rest, **adam},
                {"name": "tokens", "params": tokens, **adam, **scaled},
            ]
            groups = [group for group in groups if group["params"]]
        elif token_rows is not None:
            why = "a list of parameters does not say which rows are tokens"
            raise ValueError(f"token_rows needs the model itself: {why}")
        else:
            groups = model_or_params
        super().__init__(groups, defaults)

    def __getstate__(self):
        return super().__getstate__() | {"rules": self.rules}

    def add_param_group(self, param_group):
        """Add parameters: one of the optimizer's own groups, which has a name, or torch's, which is routed by shape."""
        name, count = param_group.get("name"), sum(len(group["params"]) for group in self.param_groups)
        if name is not None:
            rule = self.rules.get("adamw" if name == "tokens" else name)
            if rule is None:
                allowed = "muon, adamw or tokens, or have no name"
                raise ValueError(f"a parameter group is named {name!r}; it must be {allowed}")
            return self._add_named(rule | param_group)
        own = {key: value for key, value in param_group.items() if key != "params"}
        known = {*self.rules["muon"], *self.rules["adamw"], *self.defaults} - {"fused", "qk_clip_threshold"}
        for key in own.keys() - known:
            raise ValueError(f"parameter group: {unknown_name(key, known)}")
        check_rule(own)
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        named = [p if isinstance(p, tuple) else (f"parameter {i}", p) for i, p in enumerate(params, count)]
        for n, p in named:
            if not isinstance(p, torch.Tensor):
                raise TypeError(f"{n} is a {type(p).__name__}; parameters and (name, parameter) pairs can be optimized")
        for kind, rule in self.rules.items():
            part = [(n, p) for n, p in named if is_matrix(p) == (kind == "muon")]
            mine = {key: value for key, value in own.items() if key in rule or key in self.defaults}
            if part:
                self._add_named({"name": kind, "params": part, **rule, **mine})

    def _add_named(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        wrong = [n for n, p in zip(group["param_names"], group["params"]) if p.ndim != 2]
        if group["name"] == "muon" and wrong:
            raise ValueError(f"Muon takes matrices only, not {', '.join(wrong)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; p.grad is left as it was."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        threshold = self.param_groups[0]["qk_clip_threshold"]
        if threshold is not None and (self.watch is None or not self.watch.max_logits):
            unseen = "qk_clip_threshold is set, but no attention logits were seen since the last step"
            raise RuntimeError(f"{unseen}: train inside `with watch_max_logits(model) as optimizer.watch:`")
        self._raise_if_not_finite()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                grads = self._filtered_gradients(params, group)
                (self._muon if group["name"] == "muon" else self._adamw)(params, grads, group)
        if threshold is not None:
            self.clip_report = clip_heads(self.watch, threshold)
            self.watch.max_logits.clear()
        return loss

    def _raise_if_not_finite(self):
        pairs = [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"])]
        named = [(n, p.grad) for n, p in pairs if p.grad is not None]
        if not named:
            return
        norms = torch._foreach_norm([g for _, g in named])
        if not torch.stack([x.float().to(norms[0].device) for x in norms]).isfinite().all():
            # A norm can also overflow where every number is finite; that is no error.
            bad = [n for n, g in named if not g.isfinite().all()]
            if bad:
                raise TrainingError(f"gradient is not finite in {', '.join(bad)}; nothing was updated")

    def _filtered_gradients(self, params, group):
        grads = [p.grad for p in params]
        if group["grokfast_lambda"] == 0:
            return grads
        for p, grad in zip(params, grads):
            if "slow_gradient" not in self.state[p]:
                self.state[p]["slow_gradient"] = grad.clone()  # the update below leaves it as it is, exactly
        slow = [self.state[p]["slow_gradient"] for p in params]
        torch._foreach_lerp_(slow, grads, 1 - group["grokfast_alpha"])
        return torch._foreach_add(grads, slow, alpha=group["grokfast_lambda"])

    def _muon(self, params, grads, group):
        momentum, lr = group["momentum"], group["lr"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum)  # Nesterov
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        batches = {}
        for p, update in zip(params, updates):
            wide = update.T if p.shape[0] > p.shape[1] else update
            batches.setdefault((wide.shape, p.dtype, p.device), []).append((p, wide))
        for (shape, _, _), batch in batches.items():
            size = max(1, BATCH_NUMEL // shape.numel())
            for start in range(0, len(batch), size):
                several = batch[start : start + size]
                for (p, _), direction in zip(several, orthogonalize(torch.stack([w for _, w in several]))):
                    rows, cols = p.shape
                    original = group["adjust_lr_fn"] == "original"
                    scale = math.sqrt(max(1, rows / cols)) if original else 0.2 * math.sqrt(max(rows, cols))
                    p.add_(direction.T if rows > cols else direction, alpha=-lr * scale)

    def _adamw(self, params, grads, group):
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        for p in params:
            if "step" not in self.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(step=torch.zeros((), device=p.device), **moments)
        states = [self.state[p] for p in params]
        rows = group.get("token_rows") if group.get("token_scale", 1) != 1 else None
        before = [p[rows] for p in params] if rows else []
        means, squares, steps = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        rule = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": decay, "eps": group["eps"]}
        adamw(params, grads, means, squares, [], steps, fused=True, amsgrad=False, maximize=False, **rule)
        # Written from the moments: the difference of rounded weights would carry too few digits to be scaled.
        for p, old, state in zip(params, before, states):
            step = state["step"].item()
            root = (state["exp_avg_sq"][rows] / (1 - beta2**step)).sqrt() + group["eps"]
            update = state["exp_avg"][rows] / (1 - beta1**step) / root
            p[rows] = old * (1 - lr * decay) - lr * group["token_scale"] * update
