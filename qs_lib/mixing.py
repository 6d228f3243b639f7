"""The mixing head: how much to trust the thoughts, and which."""

import torch
from torch import nn


class MixingHead(nn.Module):
    """Attention over {no thought, thought 1..K} that starts at exactly the base model.

    From the hidden state without a thought, h_0, and after each thought, h_k, an MLP scores the thoughts and a
    zero-initialised gate says how much they count together:

        a_k = softmax_k s(h_0, h_k);  g = clip(mean_k v(h_0, h_k), 0, 1);  weights = (1 - g, g a_1, ..., g a_K)

    The clip passes gradients straight through, so a gate at 0 can open. After Quiet-STaR (arXiv 2403.09629 §4.3),
    whose head interpolates one thought with one unbounded weight; ours stays a distribution so that several thoughts
    can vote. ``forward(base (..., hidden), thought (..., K, hidden))`` -> weights (..., 1 + K), summing to 1. Under autocast it
    keeps its own precision: in bfloat16 a gate just opening would leave 1 - g at 1.
    """

    def __init__(self, hidden_size: int, width: int = 64):
        super().__init__()
        self.features = nn.Linear(2 * hidden_size, width)
        self.score = ZeroLinear(width, 1)
        self.gate = ZeroLinear(width, 1)

    def forward(self, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
        dtype = self.features.weight.dtype
        both = torch.cat([base.unsqueeze(-2).expand_as(thought), thought], -1).to(dtype)
        with torch.autocast(both.device.type, enabled=False):
            features = torch.nn.functional.gelu(self.features(both))
            attention = self.score(features).squeeze(-1).softmax(-1)
            gate = self.gate(features).squeeze(-1).mean(-1, keepdim=True)
        gate = gate + (gate.clamp(0, 1) - gate).detach()
        return torch.cat([1 - gate, gate * attention], -1)


class ZeroLinear(nn.Linear):
    """A linear layer that is zero when new; a type of its own so that loading code can tell it from the others."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def mix_log_probs(weights: torch.Tensor, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
    """Log of the weighted mean of probabilities.

    ``weights`` (..., 1 + K), ``base`` (..., *rest) and ``thought`` (..., K, *rest) log-probs -> (..., *rest). The paper
    interpolates log-probs (a product of experts), where one confident wrong thought vetoes the others; with several
    thoughts we take the mean of probabilities, a vote.
    """
    stacked = torch.cat([base.unsqueeze(weights.dim() - 1), thought], weights.dim() - 1)
    shape = weights.shape + (1,) * (stacked.dim() - weights.dim())
    mixed = (weights.reshape(shape) * stacked.exp()).sum(weights.dim() - 1)
    return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()


def mix_hidden(weights: torch.Tensor, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
    """Weighted mean of hidden states, before the output head: base (..., hidden), thought (..., K, hidden)."""
    return (weights.unsqueeze(-1) * torch.cat([base.unsqueeze(-2), thought], -2)).sum(-2)
