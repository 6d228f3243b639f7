"""The mixing head, which weighs the plain prediction and each thought's, and the mixture of them."""

from functools import partial

import torch
from torch import nn

from .errors import WorkbookError, at_least


class MixingHead(nn.Module):
    """Weigh {no thought, thought 1..K}, starting at exactly the base model.

    From the hidden state without a thought, h_0, and after each thought, h_k, an MLP scores the thoughts and a
    zero-initialised gate says how much they count together:

        a_k = softmax_k s(h_0, h_k);  g = clip(mean_k v(h_0, h_k), 0, 1);  weights = (1 - g, g a_1, ..., g a_K)

    The clip passes gradients straight through, so a gate at 0 can open. The head of Quiet-STaR (arXiv 2403.09629 §4.3)
    interpolates one thought with one unbounded weight. Ours stays a distribution, so that several thoughts can vote.
    ``forward``: base (..., hidden), thought (..., K, hidden) -> weights (..., 1 + K), which sum to 1.

    With ``gate="place"`` v reads h_0 alone (0 stands for h_k). Then the place decides whether thoughts count, and what they
    say decides which of them. Where a text has few places to think at, a gate that reads thoughts learns to doubt them.
    At an end of the clip, gradients outwards stop: places where thoughts always help would drive v up everywhere.
    """

    def __init__(self, hidden_size: int, width: int = 64, gate: str = "thoughts"):
        super().__init__()
        at_least(1, hidden_size=hidden_size, width=width)
        if gate not in ("thoughts", "place"):
            raise WorkbookError(f"gate is {gate!r}; it must be 'thoughts' or 'place'")
        self.by_place = gate == "place"
        self.features = nn.Linear(2 * hidden_size, width)
        self.score = ZeroLinear(width, 1)
        self.gate = ZeroLinear(width, 1)

    def forward(self, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
        dtype = self.features.weight.dtype
        both = torch.cat([base.unsqueeze(-2).expand_as(thought), thought], -1).to(dtype)
        with torch.autocast(both.device.type, enabled=False):  # in bfloat16 a gate just opening leaves 1 - g at 1
            features = torch.nn.functional.gelu(self.features(both))
            attention = self.score(features).squeeze(-1).softmax(-1)
            if self.by_place:
                alone = torch.cat([base, torch.zeros_like(base)], -1).to(dtype)
                features = torch.nn.functional.gelu(self.features(alone)).unsqueeze(-2)
            gate = self.gate(features).squeeze(-1).mean(-1, keepdim=True)
        if self.by_place and gate.requires_grad:
            gate.register_hook(partial(_inward, gate.detach()))
        gate = gate.clamp(0, 1).detach() + (gate - gate.detach())  # exact forward: the second term is 0
        return torch.cat([1 - gate, gate * attention], -1)


def _inward(gate: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return a gate's gradient, 0 where a step against it leads out of [0, 1]."""
    return gradient.masked_fill((gate >= 1) & (gradient < 0) | (gate <= 0) & (gradient > 0), 0)


class ZeroLinear(nn.Linear):
    """Start at zero. A type of its own, so that loading code can tell it from other linear layers."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class GainHead(ZeroLinear):
    """Guess, before any thought is drawn, what thinking gains at the next token, in nats. It starts at 0.

    ``forward``: last hidden states without a thought (..., hidden) -> (...). It learns from gains that were measured.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


def mix_log_probs(weights: torch.Tensor, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
    """Return log sum_k w_k p_k, the log of the weighted mean of probabilities, computed in log space.

    ``weights`` (..., 1 + K), log-probs ``base`` (..., *rest) and ``thought`` (..., K, *rest) -> (..., *rest). Weights
    may be 0 and log-probs -inf. The gradient of a log-prob is the posterior of its branch, w_k p_k / p. That of a
    weight is p_k / p, at weight 0 too, so that a shut gate can open. It is bounded by e^40: finite where p is 0.

    The paper interpolates log-probs (a product of experts), where one confident wrong thought vetoes the others. With
    several thoughts we take the mean of probabilities, a vote.
    """
    branch = weights.dim() - 1
    logs = torch.cat([base.unsqueeze(branch), thought], branch)  # (..., 1 + K, *rest)
    weights = weights.reshape(weights.shape + (1,) * (logs.dim() - weights.dim()))
    joint = weights.detach().log() + logs
    mixed = joint.logsumexp(branch, keepdim=True)
    if joint.requires_grad:  # logsumexp's gradient is nan where no branch is possible
        never = mixed.detach() == -torch.inf
        mixed = joint.masked_fill(never, 0).logsumexp(branch, keepdim=True).masked_fill(never, -torch.inf)
    if weights.requires_grad:
        ratio = (logs - mixed).detach().nan_to_num(nan=-torch.inf, posinf=40.0, neginf=-torch.inf)
        mixed = mixed + ((weights - weights.detach()) * ratio.clamp_max(40).exp()).sum(branch, keepdim=True)
    return mixed.squeeze(branch)


def mix_hidden(weights: torch.Tensor, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean (..., hidden) of hidden states base (..., hidden) and thought (..., K, hidden)."""
    return (weights.unsqueeze(-1) * torch.cat([base.unsqueeze(-2), thought], -2)).sum(-2)
