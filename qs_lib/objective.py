"""The training objective (arXiv 2403.09629 §4.4): REINFORCE on thoughts and the likelihood of what truly follows."""

from dataclasses import replace

import torch

from . import ranks
from .baking import forward_kl, frozen
from .data.tokens import thinking_ids
from .thoughts.attention import LanguageHead
from .thoughts.rescore import rescore_thoughts

PAPER_TEMPERATURE = 3.0


def advantages(rewards: torch.Tensor, objective: str = "signed", value: torch.Tensor | None = None) -> torch.Tensor:
    """Rewards (..., K) minus the mean of the other thoughts' (leave-one-out), or minus a learned ``value`` (...): ``signed``.

    ``positive`` keeps the positive part. For rewards of 0 and 1 it still has the mean direction of policy gradient, each
    problem weighted by its share of failures: of the signed gradient's p dp + (1 - p) dp it is the second term, and it
    leaves out the noise of the many ways to be wrong. ``paper`` (arXiv 2403.09629 §4.4): minus the mean of all K,
    positive part.
    """
    centred = rewards - (rewards.mean(-1) if value is None else value).unsqueeze(-1)
    if objective != "paper" and value is None:
        k = rewards.shape[-1]
        centred = centred * k / max(1, k - 1)
    return centred if objective == "signed" else centred.clamp_min(0)


def policy_gradient_loss(logprobs: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """REINFORCE: minus the mean over thoughts of advantage (..., K) x summed log-probs (..., K, T) of its tokens."""
    return -(advantage.detach() * logprobs.sum(-1)).mean()


def sampled_kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) of the sampled tokens, summed over a thought, mean over thoughts: exp(d) - d - 1 with
    d = log reference - log policy, which is never negative and has the right mean (Schulman's k3 estimator)."""
    d = reference - policy
    return (d.exp() - d - 1).sum(-1).mean()


def quiet_star_loss(model, reference, tokenizer, ids, mask, thoughts, *, n_true=4, reward="likelihood",
                    objective="signed", pg_weight=1.0, nll_weight=0.5, thought_nll_weight=0.0, look_ahead_weight=0.5,
                    kl_coefficient=0.1, base_kl=1.0, entropy_bonus=0.0, reward_floor=-6.0, value_head=None):  # fmt: skip
    """Loss, its parts, and reward and advantage of every thought, (U, K) each, for one batch of thoughts.

    loss = pg_weight REINFORCE + nll_weight (NLL of the mixture at the next token + ``look_ahead_weight`` x at the
    following ``n_true`` - 1 true tokens, teacher-forced) + thought_nll_weight (the same of each thought alone, which teaches to
    read on after a thought while the gate is still shut) + kl_coefficient KL(thoughts || ``reference``) + base_kl
    KL(reference || policy) of the prediction without thoughts - entropy_bonus x entropy. The last KL is taken twice:
    over visible tokens, which keeps the direct answers, and at the first token over all, which keeps the habit to think.

    Reward of a thought: gain in log-likelihood of the next n_true true tokens over no thought, not below
    ``reward_floor`` nats (``"likelihood"``), or 1 if the likeliest next token is the true one (``"correct"``). Unlike
    the paper's it does not pass through the mixing head, so it is not 0 while the gate is shut. ``value_head``: a map from
    the state before a thought (hidden,) to its expected reward, trained here by squared error, whose prediction is the
    baseline in place of the other thoughts' mean. ``reference``: a frozen model, a peft model to be read without its
    adapter, or None, which leaves both KLs out. Means are over the U positions that
    have thoughts, those of the first text first. With ``objective`` ``"paper"`` log-probs, entropy and KL of thoughts are those at temperature 3,
    whatever they were sampled at (appendix A).
    """
    if objective == "paper":
        thoughts = replace(thoughts, temperature=PAPER_TEMPERATURE)
    tags, there = tuple(thinking_ids(tokenizer)), thoughts.positions >= 0
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=n_true, true_logits=True, forbid_true=tags)
    valid, base, after = scored.valid[there], scored.base_logprobs[there], scored.true_logprobs[there]  # (U, n), (U, K, n)
    logprobs, entropy = scored.thought_logprobs[there], scored.thought_entropy[there]  # (U, K, T)
    gain = ((after - base.unsqueeze(1)) * valid.unsqueeze(1)).sum(-1).detach()
    truth = true_tokens(ids, thoughts.positions, n_true)[there]
    correct = (scored.true_full[there][..., 0, :].argmax(-1) == truth[:, None, 0]).float()
    rewards = correct if reward == "correct" else gain.clamp_min(reward_floor)
    value = None if value_head is None else value_head(scored.base_hidden[there][:, 0].detach()).squeeze(-1)
    advantage = advantages(rewards, objective, None if value is None else value.detach())
    weights = model.mixing_head(scored.base_hidden[there], scored.thought_hidden[there].transpose(1, 2))
    mixed = torch.cat([base.unsqueeze(-1), after.transpose(1, 2)], -1).exp()
    nll = -(weights * mixed).sum(-1).clamp_min(1e-8).log()
    discount = torch.tensor([1.0] + [look_ahead_weight] * (n_true - 1), device=nll.device)
    predicted, units = valid[..., 0].sum(), len(valid)
    nll, alone = (ranks.weigh((x * discount * valid).sum() / predicted.clamp_min(1), predicted) for x in (nll, -after.mean(1)))
    loss = pg_weight * ranks.weigh(policy_gradient_loss(logprobs, advantage), units) + nll_weight * nll
    if thought_nll_weight:
        loss = loss + thought_nll_weight * alone
    parts = {
        "reward": rewards.mean().item(), "nll": nll.item(), "thought_nll": alone.item(), "correct": correct.mean().item(),
        "no_thought_weight": weights[:, 0, 0].mean().item(), "length": thoughts.lengths[there].float().mean().item(),
        "entropy": (entropy.sum() / thoughts.sampled.sum().clamp_min(1)).item(),
        "signal": (advantage.abs().amax(-1) > 0.1).float().mean().item(),
    }  # fmt: skip
    if value is not None:
        error = ranks.weigh(((value.unsqueeze(-1) - rewards) ** 2).mean(), units)
        loss, parts["value_error"] = loss + error, error.item()
    if reference is not None and (kl_coefficient or base_kl):
        with torch.no_grad(), frozen(reference) as lm:
            ref = rescore_thoughts(lm, ids, thoughts, mask, n_true=n_true, true_logits=True, forbid_true=tags)
            first = LanguageHead(lm)(ref.base_hidden[..., 0, :]).log_softmax(-1)
        kl = ranks.weigh(sampled_kl(logprobs, ref.thought_logprobs[there]), units)
        drift = forward_kl(scored.base_full, ref.base_full)[there]
        drift = ranks.weigh((drift * valid).sum() / valid.sum().clamp_min(1), valid.sum())
        ours = LanguageHead(model.lm)(scored.base_hidden[..., 0, :]).log_softmax(-1)
        habit = ranks.weigh(forward_kl(ours, first)[there].mean(), units)
        loss = loss + kl_coefficient * kl + base_kl * (drift + habit)
        parts |= {"kl": kl.item(), "base_kl": drift.item(), "habit_kl": habit.item()}
    if entropy_bonus:
        loss = loss - entropy_bonus * ranks.weigh(entropy.sum(-1).mean(), units)
    return loss, parts, (rewards, advantage)


def true_tokens(ids: torch.Tensor, positions: torch.Tensor, n_true: int) -> torch.Tensor:
    """The ``n_true`` tokens after each position, (B, P, n_true); the last token repeated past the end."""
    at = positions.clamp_min(0).unsqueeze(-1) + 1 + torch.arange(n_true, device=ids.device)
    return ids.gather(1, at.clamp_max(ids.shape[1] - 1).flatten(1)).view(at.shape)
