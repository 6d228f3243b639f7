"""Quiet-STaR training (arXiv 2403.09629 §4): thoughts that help predict what truly follows become likelier."""

import copy
import math
import random
import time
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.batches import curriculum, disagreement, text_of, think_where
from ..data.batches import thought_length as adapted
from ..data.tokens import thinking_ids
from ..errors import TrainingError, WorkbookError
from ..evaluation.accuracy import accuracy_with_thoughts, answer_of
from ..evaluation.coherence import utility
from ..evaluation.episodes import Episode, record
from ..evaluation.likelihood import text_log_likelihood
from ..model import ZeroLinear
from ..thoughts.attention import LanguageHead, recompute_layers
from ..thoughts.generate import generate_thoughts
from ..thoughts.rescore import rescore_thoughts
from . import distributed
from .checkpoint import Checkpoint
from .distributed import check_fsdp, clip_grad_norm, gathered, shard
from .loop import add_adapter, forward_kl, frozen, schedule
from .optim import MuonGrokfast
from .qk_clip import largest_logit, watch_max_logits

PAPER_TEMPERATURE = 3.0
RECORDED = 4  # groups of thoughts kept as episodes at each validation


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


def quiet_star_loss(
    model,
    reference,
    tokenizer,
    ids,
    mask,
    thoughts,
    *,
    n_true=4,
    reward="likelihood",
    objective="signed",
    pg_weight=1.0,
    nll_weight=0.5,
    thought_nll_weight=0.0,
    look_ahead_weight=0.5,
    kl_coefficient=0.1,
    base_kl=1.0,
    entropy_bonus=0.0,
    reward_floor=-6.0,
    value_head=None,
):
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
    valid, after = scored.valid[there], scored.true_logprobs[there]  # (U, n), (U, K, n)
    logprobs, entropy = scored.thought_logprobs[there], scored.thought_entropy[there]  # (U, K, T)
    gain = utility(scored)[there].detach()
    correct = (scored.true_full[there][..., 0, :].argmax(-1) == scored.true[there][:, None, 0]).float()
    rewards = correct if reward == "correct" else gain.clamp_min(reward_floor)
    value = None if value_head is None else value_head(scored.base_hidden[there][:, 0].detach()).squeeze(-1)
    advantage = advantages(rewards, objective, None if value is None else value.detach())
    weights = model.mixing_weights(scored)
    nll = -model.mix_truth(scored, weights)[there]
    discount = torch.tensor([1.0] + [look_ahead_weight] * (n_true - 1), device=nll.device)
    predicted, units = valid[..., 0].sum(), len(valid)
    nll, alone = (
        distributed.weigh((x * discount * valid).sum() / predicted.clamp_min(1), predicted)
        for x in (nll, -after.mean(1))
    )
    loss = pg_weight * distributed.weigh(policy_gradient_loss(logprobs, advantage), units) + nll_weight * nll
    if thought_nll_weight:
        loss = loss + thought_nll_weight * alone
    parts = {
        "reward": rewards.mean().item(),
        "nll": nll.item(),
        "thought_nll": alone.item(),
        "correct": correct.mean().item(),
        "no_thought_weight": weights[there][:, 0, 0].mean().item(),
        "length": thoughts.lengths[there].float().mean().item(),
        "entropy": (entropy.sum() / thoughts.sampled.sum().clamp_min(1)).item(),
        "signal": (advantage.abs().amax(-1) > 0.1).float().mean().item(),
    }
    if value is not None:
        error = distributed.weigh(((value.unsqueeze(-1) - rewards) ** 2).mean(), units)
        loss, parts["value_error"] = loss + error, error.item()
    if reference is not None and (kl_coefficient or base_kl):
        with torch.no_grad(), frozen(reference) as lm:
            ref = rescore_thoughts(lm, ids, thoughts, mask, n_true=n_true, true_logits=True, forbid_true=tags)
            first = LanguageHead(lm)(ref.base_hidden[..., 0, :]).log_softmax(-1)
        kl = distributed.weigh(sampled_kl(logprobs, ref.thought_logprobs[there]), units)
        drift = forward_kl(scored.base_full, ref.base_full)[there]
        drift = distributed.weigh((drift * valid).sum() / valid.sum().clamp_min(1), valid.sum())
        ours = LanguageHead(model.lm)(scored.base_hidden[..., 0, :]).log_softmax(-1)
        habit = distributed.weigh(forward_kl(ours, first)[there].mean(), units)
        loss = loss + kl_coefficient * kl + base_kl * (drift + habit)
        parts |= {"kl": kl.item(), "base_kl": drift.item(), "habit_kl": habit.item()}
    if entropy_bonus:
        loss = loss - entropy_bonus * distributed.weigh(entropy.sum(-1).mean(), units)
    return loss, parts, (rewards, advantage)


def true_tokens(ids: torch.Tensor, positions: torch.Tensor, n_true: int) -> torch.Tensor:
    """The ``n_true`` tokens after each position, (B, P, n_true); the last token repeated past the end."""
    at = positions.clamp_min(0).unsqueeze(-1) + 1 + torch.arange(n_true, device=ids.device)
    return ids.gather(1, at.clamp_max(ids.shape[1] - 1).flatten(1)).view(at.shape)


@dataclass
class TrainingResult:
    """``history``: one dict per step; ``episodes``: some groups of thoughts that were trained on, before each validation;
    ``best_step`` and ``best_validation``: the weights that were kept."""

    history: list[dict] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    best_step: int = 0
    best_validation: float = math.nan
    seconds: float = 0.0


def train_quiet_star(
    model,
    tokenizer,
    problems,
    validation,
    steps: int = 300,
    batch_size: int = 32,
    num_thoughts: int = 4,
    thought_length: int = 28,
    temperature: float = 1.0,
    n_true: int = 4,
    over: int = 2,
    muon_lr: float = 1.5e-3,
    adamw_lr: float = 1e-3,
    grokfast_lambda: float = 0.1,
    token_scale: float = 1.0,
    use_curriculum: bool = True,
    hard_share: float = 0.4,
    think_at: str = "question",
    num_positions: int = 8,
    adaptive_length: bool = False,
    baseline: str = "others",
    lora_rank: int = 0,
    qk_clip_threshold: float = 0.0,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    fsdp: bool = False,
    evaluate_every: int = 50,
    seed: int = 0,
    log=lambda **metrics: None,
    checkpoint: Checkpoint | None = None,
    **objective,
) -> TrainingResult:
    """Train a :class:`QuietStarForCausalLM` in place; the weights that did best on validation are kept.

    Each step draws ``over`` x ``batch_size`` training problems, samples ``num_thoughts`` thoughts at each position
    (``think_at``, ``num_positions``: see ``think_where``) and keeps the problems whose thoughts disagree most (no label
    needed); ``objective`` goes to :func:`quiet_star_loss`. The KL reference is the language model as given.
    ``adaptive_length``: thoughts of a batch as long as its longest text deserves (``qs_lib.thought_length``), at most
    ``thought_length``. ``baseline``: mean reward of the ``others`` thoughts, or a learned linear ``value`` of the state before
    them. ``lora_rank``: train an adapter of that rank, the thinking tokens' eight rows and the mixing head in place of all
    weights, and merge it in the end. ``qk_clip_threshold``: heads whose attention logits on a batch's texts pass it are
    brought back to it (0: none; an adapter's are left alone). ``gradient_checkpointing``: keep only what goes into each layer and
    run it again in the backward pass. ``bf16``: thoughts and loss under autocast, the weights stay as they are. ``fsdp``: the
    model is sharded over the processes, and stays so (``sharding``). Validation: accuracy with thoughts after the question, or,
    for thoughts inside the text, its log-likelihood with thoughts. With a ``checkpoint``, whose log then counts, a stopped
    training goes on where it was.

    Raises ``WorkbookError`` on empty problems, another baseline or place, or a threshold for a family whose attention cannot be
    watched, ``TrainingError`` on a non-finite loss.
    """
    problems, validation = list(problems), list(validation)
    if not problems or not validation:
        raise WorkbookError("training needs at least one training and one validation problem")
    if baseline not in ("others", "value"):
        raise WorkbookError(f"baseline is {baseline!r}; it must be 'others' or 'value'")
    check_fsdp(fsdp, checkpoint, lora_rank)
    if qk_clip_threshold:
        with watch_max_logits(model.lm):  # refused before the first step
            pass
    started, rng = time.monotonic(), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    adapter = add_adapter(model.lm, tokenizer, lora_rank) if lora_rank else None  # put into model.lm, in place
    reference = adapter or copy.deepcopy(model.lm).eval().requires_grad_(False)
    if fsdp:
        shard(reference)
        shard(model.lm)
    optimizer = MuonGrokfast(
        model,
        muon_lr=muon_lr,
        adamw_lr=adamw_lr,
        grokfast_lambda=grokfast_lambda,
        qk_clip_threshold=qk_clip_threshold or None,
        token_rows=range(8) if lora_rank else thinking_ids(tokenizer),
        token_scale=token_scale,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(k, steps, 20, constant=0.3))
    result, episodes, best = TrainingResult(), [], {"step": 0, "validation": math.nan}
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "rng": rng,
        "generator": generator,
        "history": result.history,
        "episodes": episodes,
        "best": best,
    }
    if baseline == "value":
        objective["value_head"] = parts["value"] = ZeroLinear(model.config.hidden_size, 1).to(model.device)
        value_optimizer = parts["value_optimizer"] = torch.optim.AdamW(
            objective["value_head"].parameters(), lr=adamw_lr
        )
    if gradient_checkpointing:
        recompute_layers(model.lm)
    cast = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=bf16)
    model.eval()  # no dropout: log-probs must be those of the sampling policy
    with checkpoint or Checkpoint(log=log) as saving:
        distributed.check_equal(model, "before training")
        first = saving.resume(parts)
        for step in (
            bar := tqdm(
                range(first, steps), desc="quiet-star", initial=first, total=steps, disable=not distributed.first()
            )
        ):
            chosen = (
                curriculum(problems, step / steps, rng, over * batch_size, hard_share)
                if use_curriculum
                else rng.choices(problems, k=over * batch_size)
            )
            ids, mask, positions = think_where(model.lm, tokenizer, chosen, think_at, num_positions, generator)
            length = min(thought_length, adapted(ids.shape[1])) if adaptive_length else thought_length
            own = distributed.share(torch.arange(len(ids)))
            with torch.no_grad(), gathered(model.lm), cast():
                thoughts = generate_thoughts(
                    model.lm,
                    ids[own],
                    mask[own],
                    None if positions is None else positions[own],
                    num_thoughts,
                    length,
                    temperature,
                    generator=generator,
                    with_hidden=False,
                    numbers=own,
                )
            thoughts = distributed.gather_thoughts(thoughts, own, len(ids))
            differ = disagreement(thoughts)
            if over > 1:
                keep = (differ + torch.rand(len(ids), generator=generator)).topk(batch_size).indices.sort().values
                ids, mask, thoughts, chosen = (
                    ids[keep],
                    mask[keep],
                    thoughts.part(keep),
                    [chosen[i] for i in keep.tolist()],
                )
            own = distributed.share(torch.arange(len(ids)))
            with cast():
                loss, metrics, trained_on = quiet_star_loss(
                    model, reference, tokenizer, ids[own], mask[own], thoughts.part(own), n_true=n_true, **objective
                )
            value, metrics = distributed.mean(loss.item()), distributed.means(metrics)
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value} at step {step}: lower the learning rates")
            validates = (step + 1) % evaluate_every == 0 or step == steps - 1
            if validates:
                with gathered(model.lm):
                    found = first_groups(
                        model,
                        tokenizer,
                        [chosen[i] for i in own.tolist()],
                        ids[own],
                        mask[own],
                        thoughts.part(own),
                        trained_on,
                        n_true,
                        think_at == "question",
                        f"step {step + 1}",
                    )
                episodes += [e.model_dump() | {"problem": n} for n, e in enumerate(found, len(episodes))]
            loss.backward()
            distributed.average(trained)
            clip_grad_norm(model.lm.parameters(), 1.0)
            clip_grad_norm(model.mixing_head.parameters(), 1.0)
            if qk_clip_threshold:  # re-scoring has an attention of its own: the batch's texts are read once more
                with watch_max_logits(model.lm) as optimizer.watch, torch.no_grad():
                    model.lm(input_ids=ids[own], attention_mask=mask[own])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if baseline == "value":
                distributed.average(objective["value_head"].parameters())
                value_optimizer.step()
                value_optimizer.zero_grad()
            metrics |= {"step": step + 1, "loss": value, "diversity": differ.float().mean().item()}
            if validates:
                name, score = validate(
                    model, tokenizer, validation, think_at, num_thoughts, thought_length, temperature, seed
                )
                with largest_logit(model.lm) as largest, torch.no_grad():
                    model.lm(input_ids=ids, attention_mask=mask)
                metrics |= {name: score} | largest
                if not score < best["validation"]:
                    best.update(step=step + 1, validation=score, weights=[p.detach().clone() for p in trained])
            result.history.append(metrics)
            saving.log(**metrics)
            saving.after(step + 1, parts, last=step == steps - 1)
            bar.set_postfix(
                reward=f"{metrics['reward']:.2f}",
                correct=f"{metrics['correct']:.2f}",
                validation=f"{best['validation']:.3f}",
            )
    distributed.check_equal(model, "after training")
    for p, kept in zip(trained, best["weights"], strict=True):
        p.data.copy_(kept)
    if adapter is not None:
        adapter.merge_and_unload()
        model.requires_grad_(True)
    result.episodes = [Episode(**e) for e in episodes]
    result.best_step, result.best_validation = best["step"], best["validation"]
    result.seconds = time.monotonic() - started
    return result


def first_groups(
    model, tokenizer, problems, ids, mask, thoughts, trained_on, n_true: int, at_end: bool, stage: str
) -> list[Episode]:
    """The first few texts' thoughts as episodes, with the reward and advantage they were trained on; of a text with several
    positions, the one whose rewards differ most. ``at_end``: thoughts stand before the answer."""
    there, found = (thoughts.positions >= 0).nonzero(), []
    for row in range(min(RECORDED, len(ids))):
        units = (there[:, 0] == row).nonzero().squeeze(1)
        if not len(units):
            continue
        spread = trained_on[0][units].amax(-1) - trained_on[0][units].amin(-1)
        unit = units[spread.argmax()]
        slot = there[unit, 1].item()
        one = thoughts.part(slice(row, row + 1), slice(slot, slot + 1))
        document, at = ids[row][mask[row].bool()].tolist(), one.positions.item()
        following = document[at + 1 :] if at_end else document[at + 1 : at + 1 + n_true]
        p = problems[row]
        about = {
            "problem": 0,
            "stage": stage,
            "question": p["question"],
            "family": p["family"],
            "difficulty": p["difficulty"],
            "answer": p["answer"] if at_end else answer_of(tokenizer, following) or None,
        }
        found.append(
            record(
                model,
                tokenizer,
                document,
                one,
                about,
                len(following),
                n_true,
                trained=[values[unit] for values in trained_on],
            )
        )
    return found


def validate(
    model, tokenizer, problems, think_at: str, num_thoughts: int, thought_length: int, temperature: float, seed: int
) -> tuple[str, float]:
    """What training is judged by, as (name, value): accuracy with thoughts after the question, or the mean log-likelihood of
    the problems' whole texts with thoughts inside, nats per token."""
    settings = {
        "num_thoughts": num_thoughts,
        "thought_length": thought_length,
        "temperature": temperature,
        "seed": seed,
    }
    if think_at == "question":
        return "validation_accuracy", accuracy_with_thoughts(model, tokenizer, problems, **settings)[
            "mixed"
        ].mean().item()
    likelihood = text_log_likelihood(model, tokenizer, [text_of(p) for p in problems], **settings)
    return "validation_log_likelihood", float(np.nanmean(likelihood["with"]))
