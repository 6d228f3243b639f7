"""Quiet-STaR training (arXiv 2403.09629 §4): thoughts that help predict what truly follows become likelier."""

import copy
import math
import random
import time
from dataclasses import dataclass, field, replace

import torch
from tqdm.auto import tqdm

from .attention import LanguageHead
from .baking import forward_kl
from .champion import schedule
from .evaluate import accuracy_with_thoughts
from .optim import MuonGrokfast
from .sequences import encode, pad
from .strategies import reply
from .thoughts import generate_thoughts, rescore_thoughts
from .tokens import thinking_ids

PAPER_TEMPERATURE = 3.0


@dataclass
class TrainingResult:
    """``history``: one dict per logged step; ``best_step`` and ``best_accuracy`` on validation (the weights kept)."""

    history: list[dict] = field(default_factory=list)
    best_step: int = 0
    best_accuracy: float = math.nan
    seconds: float = 0.0


def answer_batch(tokenizer, problems: list[dict]):
    """Questions with their answers, right-padded: input_ids and attention_mask (B, L), and positions (B, 1) of the
    last question token, after which the model thinks."""
    sequences = [encode(tokenizer, p["question"], reply(None, p)) for p in problems]
    ids = pad([s.ids for s in sequences], tokenizer.pad_token_id)
    mask = pad([[1] * len(s.ids) for s in sequences], 0)
    return ids, mask, torch.tensor([[s.start - 1] for s in sequences])


def advantages(rewards: torch.Tensor, objective: str = "signed") -> torch.Tensor:
    """Rewards (..., K) minus the mean of the other thoughts' (leave-one-out): ``signed``.

    ``positive`` keeps the positive part. For rewards of 0 and 1 it still has the mean direction of policy gradient, each
    problem weighted by its share of failures: of the signed gradient's p dp + (1 - p) dp it is the second term, and it
    leaves out the noise of the many ways to be wrong. ``paper`` (arXiv 2403.09629 §4.4): minus the mean of all K,
    positive part.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    if objective != "paper":
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
                    objective="signed", pg_weight=1.0, nll_weight=0.5, look_ahead_weight=0.5, kl_coefficient=0.1,
                    base_kl=1.0, entropy_bonus=0.0, reward_floor=-6.0):  # fmt: skip
    """Loss and its parts for one batch of thoughts.

    loss = pg_weight REINFORCE + nll_weight (NLL of the mixture at the next token + ``look_ahead_weight`` x at the
    following ``n_true`` - 1 true tokens, teacher-forced) + kl_coefficient KL(thoughts || ``reference``) + base_kl
    KL(reference || policy) of the prediction without thoughts - entropy_bonus x entropy. The last KL is taken twice:
    over visible tokens, which keeps the direct answers, and at the first token over all, which keeps the habit to think.

    Reward of a thought: gain in log-likelihood of the next n_true true tokens over no thought, not below
    ``reward_floor`` nats (``"likelihood"``), or 1 if the likeliest next token is the true one (``"correct"``). Unlike
    the paper's it does not pass through the mixing head, so it is not 0 while the gate is shut. ``reference`` None
    leaves both KLs out. With ``objective`` ``"paper"`` log-probs, entropy and KL of thoughts are those at temperature 3,
    whatever they were sampled at (appendix A).
    """
    if objective == "paper":
        thoughts = replace(thoughts, temperature=PAPER_TEMPERATURE)
    tags = tuple(thinking_ids(tokenizer))
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=n_true, true_logits=True, forbid_true=tags)
    valid = scored.valid.unsqueeze(2)
    gain = ((scored.true_logprobs - scored.base_logprobs.unsqueeze(2)) * valid).sum(-1).detach()
    truth = true_tokens(ids, thoughts.positions, n_true)
    if reward == "correct":
        rewards = (scored.true_full[..., 0, :].argmax(-1) == truth[:, :, None, 0]).float()
    else:
        rewards = gain.clamp_min(reward_floor)
    advantage = advantages(rewards, objective)
    weights = model.mixing_head(scored.base_hidden, scored.thought_hidden.transpose(2, 3))
    mixed = torch.cat([scored.base_logprobs.unsqueeze(-1), scored.true_logprobs.transpose(2, 3)], -1).exp()
    nll = -(weights * mixed).sum(-1).clamp_min(1e-8).log()
    discount = torch.tensor([1.0] + [look_ahead_weight] * (n_true - 1))
    nll = (nll * discount * scored.valid).sum() / scored.valid[..., 0].sum().clamp_min(1)
    loss = pg_weight * policy_gradient_loss(scored.thought_logprobs, advantage) + nll_weight * nll
    parts = {
        "reward": rewards.mean().item(), "nll": nll.item(),
        "correct": (scored.true_full[..., 0, :].argmax(-1) == truth[:, :, None, 0]).float().mean().item(),
        "no_thought_weight": weights[..., 0, 0].mean().item(),
        "length": thoughts.lengths.float().mean().item(),
        "entropy": (scored.thought_entropy.sum() / thoughts.sampled.sum().clamp_min(1)).item(),
        "signal": (advantage.abs().amax(-1) > 0.1).float().mean().item(),
    }  # fmt: skip
    if reference is not None and (kl_coefficient or base_kl):
        with torch.no_grad():
            ref = rescore_thoughts(reference, ids, thoughts, mask, n_true=n_true, true_logits=True, forbid_true=tags)
        kl = sampled_kl(scored.thought_logprobs, ref.thought_logprobs)
        drift = (forward_kl(scored.base_full, ref.base_full) * scored.valid).sum() / scored.valid.sum().clamp_min(1)
        first, ours = (LanguageHead(lm)(r.base_hidden[..., 0, :]).log_softmax(-1)
                       for lm, r in ((reference, ref), (model.lm, scored)))  # fmt: skip
        habit = forward_kl(ours, first)[thoughts.positions >= 0].mean()
        loss = loss + kl_coefficient * kl + base_kl * (drift + habit)
        parts |= {"kl": kl.item(), "base_kl": drift.item(), "habit_kl": habit.item()}
    if entropy_bonus:
        loss = loss - entropy_bonus * scored.thought_entropy.sum(-1).mean()
    return loss, parts


def true_tokens(ids: torch.Tensor, positions: torch.Tensor, n_true: int) -> torch.Tensor:
    """The ``n_true`` tokens after each position, (B, P, n_true); the last token repeated past the end."""
    at = positions.clamp_min(0).unsqueeze(-1) + 1 + torch.arange(n_true)
    return ids.gather(1, at.clamp_max(ids.shape[1] - 1).flatten(1)).view(at.shape)


def disagreement(thoughts) -> torch.Tensor:
    """Label-free difficulty of each row: number of different last tokens before </think> among its thoughts, (B,)."""
    last = (thoughts.lengths - 2).clamp_min(0).unsqueeze(-1)
    ends = thoughts.tokens.gather(-1, last).flatten(1)
    return torch.tensor([len(set(row)) for row in ends.tolist()])


def curriculum(problems: list[dict], progress: float, rng: random.Random, size: int, hard_share: float = 0.4):
    """``size`` problems, easy to hard: up to the difficulty that ``progress`` (0..1) has reached, all from a tenth on,
    ``hard_share`` of them of the highest difficulty reached."""
    levels = sorted({p["difficulty"] for p in problems})
    reached = levels[: max(1, math.ceil(min(1.0, 10 * progress + 1e-9) * len(levels)))]
    by_level = {level: [p for p in problems if p["difficulty"] == level] for level in reached}
    hard = round(size * hard_share)
    picked = [rng.choice(by_level[reached[-1]]) for _ in range(hard)]
    return picked + [rng.choice(by_level[rng.choice(reached)]) for _ in range(size - hard)]


def train_quiet_star(model, tokenizer, problems, validation, steps: int = 300, batch_size: int = 32,
                     num_thoughts: int = 4, thought_length: int = 28, temperature: float = 1.0, over: int = 2,
                     muon_lr: float = 1.5e-3, adamw_lr: float = 1e-3, grokfast_lambda: float = 0.1,
                     token_scale: float = 1.0, use_curriculum: bool = True, hard_share: float = 0.4,
                     evaluate_every: int = 50, seed: int = 0, log=lambda **metrics: None, **objective) -> TrainingResult:
    """Train a :class:`QuietStarForCausalLM` in place; the weights that did best on validation are kept.

    Each step draws ``over`` x ``batch_size`` training problems, samples ``num_thoughts`` thoughts after each question and
    keeps the problems whose thoughts disagree most (no label needed); ``objective`` goes to :func:`quiet_star_loss`.
    The KL reference is a frozen copy of the language model as given.

    Raises ``ValueError`` on empty problems or a non-positive size, ``FloatingPointError`` on a non-finite loss.
    """
    problems, validation = list(problems), list(validation)
    if not problems or not validation:
        raise ValueError("training needs at least one training and one validation problem")
    started, rng = time.monotonic(), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    reference = copy.deepcopy(model.lm).eval().requires_grad_(False)
    optimizer = MuonGrokfast(model, muon_lr=muon_lr, adamw_lr=adamw_lr, grokfast_lambda=grokfast_lambda,
                             token_rows=torch.tensor(thinking_ids(tokenizer)), token_scale=token_scale)  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(k, steps, 20, constant=0.3))
    result, best = TrainingResult(), None
    model.eval()  # no dropout: log-probs must be those of the sampling policy
    bar = tqdm(range(steps), desc="quiet-star")
    for step in bar:
        chosen = (curriculum(problems, step / steps, rng, over * batch_size, hard_share) if use_curriculum
                  else rng.choices(problems, k=over * batch_size))  # fmt: skip
        ids, mask, positions = answer_batch(tokenizer, chosen)
        with torch.no_grad():
            thoughts = generate_thoughts(model.lm, ids, mask, positions, num_thoughts, thought_length, temperature,
                                         generator=generator, with_hidden=False)  # fmt: skip
        if over > 1:
            noise = torch.rand(len(ids), generator=generator)
            keep = (disagreement(thoughts) + noise).topk(batch_size).indices.sort().values
            ids, mask, thoughts = ids[keep], mask[keep], thoughts.part(keep)
        loss, parts = quiet_star_loss(model, reference, tokenizer, ids, mask, thoughts, **objective)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the learning rates")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.lm.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(model.mixing_head.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        parts |= {"step": step + 1, "loss": loss.item()}
        if (step + 1) % evaluate_every == 0 or step == steps - 1:
            model.eval()
            accuracy = accuracy_with_thoughts(model, tokenizer, validation, num_thoughts, thought_length, temperature,
                                              seed=seed)["mixed"].mean().item()  # fmt: skip
            parts["validation_accuracy"] = accuracy
            if best is None or accuracy >= result.best_accuracy:
                best = copy.deepcopy(model.state_dict())
                result.best_step, result.best_accuracy = step + 1, accuracy
        result.history.append(parts)
        log(**parts)
        bar.set_postfix(reward=f"{parts['reward']:.2f}", correct=f"{parts['correct']:.2f}",
                        validation=f"{result.best_accuracy:.3f}")  # fmt: skip
    model.load_state_dict(best)
    result.seconds = time.monotonic() - started
    return result
