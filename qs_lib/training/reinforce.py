"""Quiet-STaR training (arXiv 2403.09629 §4): thoughts that help predict what truly follows become likelier."""

import copy
import random
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch

from ..data.batches import curriculum, disagreement, think_where
from ..data.batches import thought_length as deserved_length
from ..data.tokens import thinking_ids
from ..errors import ParameterError, WorkbookError
from ..evaluation.accuracy import accuracy_with_thoughts, answer_of
from ..evaluation.coherence import utility
from ..evaluation.episodes import Episode
from ..thoughts.attention import LanguageHead, backbone
from ..thoughts.generate import Thoughts, generate_thoughts
from ..thoughts.rescore import Rescored, rescore_thoughts
from . import distributed
from .checkpoint import Checkpoint
from .heads import fit_mixing_head
from .loop import forward_kl, frozen, scheduled, training, update
from .optim import MuonGrokfast
from .qk_clip import largest_logit, watch_max_logits
from .settings import QuietStarSettings
from .watching import first_groups, validate, watch

PAPER_TEMPERATURE = 3.0
SLOW = 0.999  # share of its weights that RLP's slow average keeps, each step (arXiv 2510.01265 §3)
FITTED = 600  # problems to whose thoughts the mixing head is fitted in the end
STEEPEST = 100.0  # largest slope of a problem's NLL in the weights, nats: that of a right answer whose weight is .01
REWARD_FLOOR = -6.0  # nats; one thought that makes the truth impossible would drown all others


@dataclass(frozen=True)
class RunningText:
    """Whole ``texts`` (records as ``text_of`` takes them) that are trained on beside questions, with thoughts inside.

    ``share``: theirs of each step's batch and of its loss. ``at``: where in them, see ``think_where``. With them the
    last weights are kept: accuracy after questions does not tell what texts gained since.
    """

    texts: list[dict]
    share: float = 0.4
    at: str = "random"

    def settings(self, s: QuietStarSettings) -> QuietStarSettings:
        """Return the settings of a step's texts."""
        return s.but(think_at=self.at, batch_size=max(1, round(self.share * s.batch_size)), over=1)


@dataclass
class TrainingResult:
    """What training did.

    ``history``: one dict per step. ``episodes``: some groups of thoughts that were trained on, before each validation.
    ``watched``: thoughts on a few held-out problems, before the first step and at each validation (``watching.watch``).
    ``best_step`` and ``best_validation``: the weights that were kept, of step 0 if every step did worse.
    """

    history: list[dict] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    watched: list[Episode] = field(default_factory=list)
    start_validation: float = float("nan")
    best_step: int = 0
    best_validation: float = float("nan")
    seconds: float = 0.0


class Rollouts(NamedTuple):
    """Thoughts of a batch: its problems, ids and mask (B, L), and ``Thoughts`` (B, P, K, T)."""

    problems: list[dict]
    ids: torch.Tensor
    mask: torch.Tensor
    thoughts: Thoughts

    def rows(self, rows: torch.Tensor) -> "Rollouts":
        """Return those of some rows."""
        problems = [self.problems[i] for i in rows.tolist()]
        return Rollouts(problems, self.ids[rows], self.mask[rows], self.thoughts.part(rows))


# Its documentation makes it longer than sixty lines: the loop stays in one piece, to be read as the algorithm.
def train_quiet_star(
    model,
    tokenizer,
    problems,
    validation,
    settings: QuietStarSettings | None = None,
    checkpoint=None,
    running: RunningText | None = None,
    **changed,
) -> TrainingResult:
    """Train a :class:`QuietStarForCausalLM` in place. The weights that did best on validation, or the first, are kept.

    Each step draws ``over`` x ``batch_size`` training problems, samples ``num_thoughts`` thoughts at each position,
    keeps the problems whose thoughts disagree most (no label needed), re-scores them and takes one optimizer step on
    :func:`quiet_star_loss`. The mixing head learns from those left out too (:func:`head_nll`). The reference model is
    the language model as given. With ``lora_rank`` an adapter, the thinking tokens' rows and the mixing head are
    trained, and the adapter is merged in the end. ``changed`` replaces single settings.

    Validation is accuracy with thoughts after the question or, for thoughts inside the text, its log-likelihood with
    thoughts. With a ``checkpoint`` a stopped training goes on where it was. Where ``nll_weight`` is 0, thoughts are
    validated all alike, and the head is fitted in the end (:func:`fit_mixing_head`).

    Raises ``WorkbookError`` on empty problems or a family that cannot be clipped, ``ParameterError`` on a bad setting,
    ``TrainingError`` on a non-finite loss.
    """
    s = QuietStarSettings.of(settings, **changed)
    if s.pg_weight == s.nll_weight == s.thought_nll_weight == 0:
        raise ParameterError("pg_weight, nll_weight and thought_nll_weight are all 0: nothing would be trained")
    if s.objective == "rlp" and (s.kl_coefficient or s.base_kl or s.lora_rank):
        raise ParameterError("objective rlp has no KL and no adapter: set kl_coefficient, base_kl and lora_rank to 0")
    problems, validation = list(problems), list(validation)
    if not problems or not validation:
        raise WorkbookError("training needs at least one training and one validation problem")
    problems = within_band(model, tokenizer, problems, s)
    started, rng, generator = time.monotonic(), random.Random(s.seed), torch.Generator().manual_seed(s.seed)
    result, episodes, watched, best = TrainingResult(), [], [], {}
    if s.qk_clip_threshold:
        with watch_max_logits(model.lm):  # a family that cannot be watched is refused before the first step
            pass
    with training(model.lm, tokenizer, s) as lm, checkpoint or Checkpoint() as saving:
        reference, optimizer = prepared(model, lm, tokenizer, s)
        scheduler = scheduled(optimizer, s.steps, warm_up=20, constant=0.3)
        trained = [p for p in model.parameters() if p.requires_grad]
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": rng, "generator": generator}
        parts |= {"history": result.history, "episodes": episodes, "watched": watched, "best": best}
        parts |= {"reference": reference} if s.objective == "rlp" else {}  # it follows the policy
        for step, bar in saving.steps(parts, s.steps, "quiet-star"):
            if step == 0:  # the start is judged too, and kept if every step does worse
                watched += watch(model, tokenizer, validation, s, 0)
                start = validate(model, tokenizer, validation, s)[1]
                best.update(step=0, start=start, validation=start, weights=[p.detach().clone() for p in trained])
            began = time.monotonic()
            drawn = draw_rollouts(model, tokenizer, problems, step, s, rng, generator)
            kept, left, diversity = keep_disputed(drawn, s, generator)
            mine, others = (part.rows(distributed.share(torch.arange(len(part.ids)))) for part in (kept, left))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=s.bf16):
                loss, metrics, credit = quiet_star_loss(model, reference, tokenizer, *mine[1:], s)
                if len(left.ids) and s.nll_weight and s.head_sees_all:
                    beside = len(left.ids) / len(kept.ids)  # each problem counts alike
                    loss = loss + beside * s.nll_weight * head_nll(model, tokenizer, *others[1:], s)
                if running:
                    inside = draw_rollouts(model, tokenizer, running.texts, step, running.settings(s), rng, generator)
                    other, found, _ = quiet_star_loss(model, reference, tokenizer, *inside[1:], running.settings(s))
                    loss = (1 - running.share) * loss + running.share * other
                    metrics |= {f"text_{name}": value for name, value in found.items()}
            validates = (step + 1) % s.evaluate_every == 0 or step == s.steps - 1
            if validates and loss.isfinite():
                found = first_groups(model, tokenizer, mine, credit, s, f"step {step + 1}")
                episodes += [e.model_dump() | {"problem": n} for n, e in enumerate(found, len(episodes))]
            if s.qk_clip_threshold:  # re-scoring has an attention of its own: the batch's texts are read once more
                with watch_max_logits(model.lm) as optimizer.watch, torch.no_grad():
                    model.lm(input_ids=mine.ids, attention_mask=mine.mask)
            clipped = {"model": model.lm.parameters(), "head": model.mixing_head.parameters()}
            clipped["gain_head"] = model.gain_head.parameters()
            taken = update(loss, optimizer, scheduler, clipped, "the loss")
            if s.objective == "rlp":
                follow(reference, model.lm)
            metrics = {name: distributed.mean(value) for name, value in metrics.items()} | taken
            metrics |= {"step": step + 1, "diversity": diversity}
            if validates:
                watched += watch(model, tokenizer, validation, s, step + 1)
                name, score = validate(model, tokenizer, validation, s)
                with largest_logit(model.lm) as largest, torch.no_grad():
                    backbone(model.lm)(input_ids=kept.ids, attention_mask=kept.mask)
                metrics |= {name: score} | largest
                if running or not score < best["validation"]:
                    best.update(step=step + 1, validation=score, weights=[p.detach().clone() for p in trained])
            result.history.append(metrics)
            saving.log(**metrics, seconds=time.monotonic() - began)
            if validates:
                _warn_if_tied(result.history[-s.evaluate_every :], s)
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", validation=f"{best['validation']:.3f}")
        for p, weights in zip(trained, best["weights"], strict=True):
            p.data.copy_(weights)
    if not s.nll_weight:
        asked, told = (problems[:FITTED], ()) if s.think_at == "question" else ((), problems[:FITTED])
        budget = {"num_thoughts": s.num_thoughts, "thought_length": s.thought_length, "temperature": s.temperature}
        fit_mixing_head(model, tokenizer, asked, told, s.n_true, **budget, seed=s.seed)
    result.episodes, result.watched = ([Episode(**e) for e in kept] for kept in (episodes, watched))
    result.start_validation = best["start"]
    result.best_step, result.best_validation = best["step"], best["validation"]
    result.seconds = time.monotonic() - started
    return result


PASSES = 8  # thoughts that a pass rate is estimated from
SEEN = 2000  # problems whose pass rate is estimated, at most: each costs as much as it does in a step


def within_band(model, tokenizer, problems: list[dict], s: QuietStarSettings) -> list[dict]:
    """Return the problems that single thoughts of the model answer at a rate from ``pass_low`` to ``pass_high``.

    All right or all wrong, thoughts leave nothing to choose from. At most ``SEEN`` are tried. Raises ``WorkbookError``.
    """
    if (s.pass_low, s.pass_high) == (0, 1):
        return problems
    problems = random.Random(s.seed).sample(problems, min(SEEN, len(problems)))
    budget = {"num_thoughts": PASSES, "thought_length": s.thought_length, "temperature": s.temperature}
    found = accuracy_with_thoughts(model, tokenizer, problems, "thoughts", True, **budget, seed=s.seed)
    rates = found["each"].mean(1).tolist()
    kept = [p for p, rate in zip(problems, rates, strict=True) if s.pass_low <= rate <= s.pass_high]
    if not kept:
        band = f"pass rate from {s.pass_low} to {s.pass_high}"
        raise WorkbookError(f"none of {len(problems)} problems has a {band}: widen it, or bake longer")
    return kept


def prepared(model, lm, tokenizer, s: QuietStarSettings):
    """Return (reference model, optimizer) of a training, and leave the policy without dropout.

    Log-probs are then those of the policy that samples. ``lm``: ``model.lm``, or the peft model around it.
    """
    reference = lm if s.lora_rank else copy.deepcopy(lm).eval().requires_grad_(False)
    rates = {"muon_lr": s.muon_lr, "adamw_lr": s.adamw_lr, "grokfast_lambda": s.grokfast_lambda}
    tokens = {"token_rows": range(8) if s.lora_rank else thinking_ids(tokenizer), "token_scale": s.token_scale}
    whole = lm if s.head_lr else model
    optimizer = MuonGrokfast(whole, **rates, **tokens, muon=s.muon, qk_clip_threshold=s.qk_clip_threshold or None)
    if s.head_lr:
        heads = {"mixing_head": model.mixing_head, "gain_head": model.gain_head}
        head = [(f"{name}.{part}", p) for name, module in heads.items() for part, p in module.named_parameters()]
        optimizer.add_param_group({"name": "adamw", "params": head, "lr": s.head_lr})
    model.eval()
    return reference, optimizer


@torch.no_grad()
def follow(slow, model) -> None:
    """Move the slow average, in place, towards the model: ``SLOW`` of its weights stay."""
    for old, new in zip(slow.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - SLOW)


def _warn_if_tied(rows: list[dict], s: QuietStarSettings) -> None:
    """Say it where REINFORCE had nothing to go by."""
    if s.pg_weight and distributed.first() and all(row["tied"] == 1 for row in rows):
        sentence = f"no thoughts differed in reward in {len(rows)} steps up to step {rows[-1]['step']}"
        advice = "raise temperature, num_thoughts or thought_length"
        warnings.warn(f"{sentence}, so REINFORCE trained nothing: {advice}", stacklevel=3)


@torch.no_grad()
def draw_rollouts(model, tokenizer, problems, step: int, s: QuietStarSettings, rng, generator) -> Rollouts:
    """Choose the problems of a step and sample thoughts on them, each process its share."""
    size = s.over * s.batch_size
    easy = step / s.steps, rng, size, s.hardest_share
    chosen = curriculum(problems, *easy) if s.use_curriculum else rng.choices(problems, k=size)
    ids, mask, positions = think_where(model.lm, tokenizer, chosen, s.think_at, s.num_positions, generator)
    length = min(s.thought_length, deserved_length(ids.shape[1])) if s.adaptive_length else s.thought_length
    own = distributed.share(torch.arange(len(ids)))
    budget = {"num_thoughts": s.num_thoughts, "thought_length": length, "temperature": s.temperature}
    places = None if positions is None else positions[own]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=s.bf16):
        sample = partial(generate_thoughts, generator=generator, with_hidden=False, numbers=own)
        thoughts = sample(model.lm, ids[own], mask[own], places, **budget)
    return Rollouts(chosen, ids, mask, distributed.gather_thoughts(thoughts, own, len(ids)))


def keep_disputed(drawn: Rollouts, s: QuietStarSettings, generator) -> tuple[Rollouts, Rollouts, float]:
    """Return the ``batch_size`` problems whose thoughts disagree most, those left out, and the mean number of answers."""
    differ = disagreement(drawn.thoughts)
    kept = torch.full(differ.shape, s.over == 1)
    if s.over > 1:
        chance = torch.rand(len(differ), generator=generator)  # decides between equals
        kept[(differ + chance).topk(s.batch_size).indices] = True
    return drawn.rows(kept.nonzero()[:, 0]), drawn.rows((~kept).nonzero()[:, 0]), differ.float().mean().item()


def advantages(rewards: torch.Tensor, objective: str) -> torch.Tensor:
    """Return the advantages of rewards (..., K) over the mean of the other thoughts' (leave-one-out).

    ``signed``: as they are. ``positive``: their positive part. For rewards of 0 and 1 it still has the mean direction
    of policy gradient, each problem weighted by its share of failures: of the signed gradient's p dp + (1 - p) dp it is
    the second term, and it leaves out the noise of the many ways to be wrong. ``paper`` (arXiv 2403.09629 §4.4): minus
    the mean of all K, positive part.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)  # RLP's K / (K - 1) (r - mean) is ``signed`` too
    if objective != "paper":
        k = rewards.shape[-1]
        centred = centred * k / max(1, k - 1)
    return centred if objective in ("signed", "rlp") else centred.clamp_min(0)


def policy_gradient_loss(logprobs: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """REINFORCE: minus the mean over thoughts of advantage (..., K) x summed log-probs (..., K, T) of its tokens."""
    return -(advantage.detach() * logprobs.sum(-1)).mean()


def sampled_kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(policy || reference) from log-probs (..., T) of thoughts' tokens, in nats, a mean over thoughts.

    Schulman's k3, exp(d) - d - 1 with d = log reference - log policy. Its mean gradient is the other KL's, as in GRPO.
    """
    d = reference - policy
    return (d.exp() - d - 1).sum(-1).mean()


# Its documentation makes it longer than sixty lines: the loss is read beside its equation.
def quiet_star_loss(model, reference, tokenizer, ids, mask, thoughts: Thoughts, s: QuietStarSettings):
    """Return a batch's loss (arXiv 2403.09629 §4.4), its parts, and the thoughts' (reward, advantage), (U, K) each.

    loss = pg_weight REINFORCE
         + nll_weight (NLL of the mixture at the next true token + look_ahead_weight x at the n_true - 1 after it)
         + thought_nll_weight (the same of each thought alone)
         + kl_coefficient KL(thoughts || reference) + base_kl KL(reference || policy) of the prediction without thoughts

    True tokens are teacher-forced. The last KL is taken twice: over visible tokens, which keeps direct answers, and at
    the first token over all, which keeps the habit to think. Means are over the U positions that have thoughts.

    The reward of a thought is its utility: the gain in log-likelihood of the next ``n_true`` true tokens over no
    thought, not below ``REWARD_FLOOR`` nats. Or it is their ``probability`` after the thought, which is bounded. Or it
    is 1 if the answer is right (``reward="correct"``, see :func:`judged_tokens`) and 0 if it is not. Unlike the paper's
    it does not pass through the mixing head, so it is not 0 while the gate is shut. Where REINFORCE stands alone, only
    thoughts with an advantage are read for a gradient (:func:`credited`). ``reference``: a frozen model, a peft model
    that is read without its adapter, or None, which leaves both KLs out. With ``objective="paper"`` log-probs, entropy
    and KL of thoughts are those at temperature 3, whatever they were sampled at (appendix A). With ``objective="rlp"``
    (arXiv 2510.01265, eq. 4 to 6) the reward is the gain over what ``reference``, the slow average of the model, expects
    without a thought, and there is no KL. That baseline is the same for all thoughts of a group, so it leaves their
    advantages alone but where the floor cuts in. We keep the mixture's likelihood in the loss, which trains the gate, and
    do not clip ratios: every step draws anew.
    """
    if s.objective == "paper":
        thoughts = replace(thoughts, temperature=PAPER_TEMPERATURE)
    rewarded_alone = not any((s.nll_weight, s.thought_nll_weight, s.kl_coefficient, s.base_kl))
    forbid, whole = tuple(thinking_ids(tokenizer)), not rewarded_alone  # a vocabulary for each true token fills memory
    rescore = partial(rescore_thoughts, n_true=s.n_true, true_logits=whole, forbid_true=forbid)
    with torch.set_grad_enabled(not rewarded_alone):
        scored, there = rescore(model.lm, ids, thoughts, mask), thoughts.positions >= 0
    valid, units = scored.valid[there], int(there.sum())
    judged = judged_tokens(tokenizer, ids, mask, thoughts.positions, s)[there] & valid
    after = (scored.true_full if whole else scored.thought_hidden)[there].unbind(-2)
    said = torch.stack([(x if whole else model.visible_log_probs(x)).argmax(-1) for x in after], -1)
    likeliest = said == scored.true[there].unsqueeze(1)  # (U, K, n_true)
    correct = (likeliest | ~judged.unsqueeze(1)).all(-1).float()
    if s.objective == "rlp":
        with torch.no_grad():
            plain = rescore(reference, ids, thoughts, mask, after=False).base_logprobs
        rewards = utility(replace(scored, base_logprobs=plain))[there].detach().clamp_min(REWARD_FLOOR)
    elif s.reward == "likelihood":
        rewards = utility(scored)[there].detach().clamp_min(REWARD_FLOOR)
    else:  # where no token exists its log-prob is 0
        rewards = correct if s.reward == "correct" else scored.true_logprobs[there].sum(-1).detach().exp()
    advantage = advantages(rewards, s.objective)
    policy = credited(model.lm, ids, mask, thoughts, advantage) if rewarded_alone else scored
    logprobs = policy.thought_logprobs[there]
    weights = model.mixing_weights(scored)
    if s.nll_weight and s.head_sees_all and weights.requires_grad:
        weights.register_hook(partial(cut, problems=units / s.nll_weight))
    reinforce = distributed.weigh(policy_gradient_loss(logprobs, advantage), units)
    mixed = model.mix_truth(scored, weights)[there]
    nll, alone = (look_ahead_nll(found, valid, s) for found in (mixed, scored.true_logprobs[there].mean(1)))
    loss = s.pg_weight * reinforce + s.nll_weight * nll
    if s.thought_nll_weight:
        loss = loss + s.thought_nll_weight * alone
    gains = (mixed - scored.base_logprobs[there])[:, 0].detach().clamp(REWARD_FLOOR, -REWARD_FLOOR)
    guess = model.gain_head(scored.base_hidden[there][:, 0].detach())
    loss = loss + distributed.weigh(torch.nn.functional.huber_loss(guess, gains), units)  # of the gain head alone
    parts = {"reward": rewards.mean(), "gain": gains.mean(), "correct": correct.mean(), "nll": nll}
    parts |= {"no_thought_weight": weights[there][:, 0, 0].mean(), "length": thoughts.lengths[there].float().mean()}
    parts |= {"thought_nll": alone, "entropy": scored.thought_entropy.sum() / thoughts.sampled.sum().clamp_min(1)}
    parts["tied"] = (rewards.amax(-1) - rewards.amin(-1) < 1e-4).float().mean()
    parts["signal"] = (advantage.abs().amax(-1) > 0.1).float().mean()
    if reference is not None and s.objective != "rlp" and (s.kl_coefficient or s.base_kl):
        kls = reference_kls(model, reference, scored, rescore, ids, mask, thoughts)
        loss = loss + s.kl_coefficient * kls["kl"] + s.base_kl * (kls["base_kl"] + kls["habit_kl"])
        parts |= kls
    return loss, {name: value.item() for name, value in parts.items()}, (rewards, advantage)


def credited(lm, ids, mask, thoughts: Thoughts, advantage: torch.Tensor) -> Rescored:
    """Re-score, with a gradient, only thoughts whose ``advantage`` (U, K) is not 0. Log-probs of the others are 0."""
    used, there = torch.zeros_like(thoughts.lengths, dtype=torch.bool), thoughts.positions >= 0
    used[there] = (advantage != 0) | ~advantage.any()  # all, if none has one: their gradient is 0
    kept = {"sampled": thoughts.sampled & used[..., None], "lengths": thoughts.lengths * used}
    kept["positions"] = thoughts.positions.masked_fill(~used.any(-1), -1)
    return rescore_thoughts(lm, ids, replace(thoughts, **kept), mask, n_true=1, after=False)


def look_ahead_nll(logprobs: torch.Tensor, valid: torch.Tensor, s: QuietStarSettings) -> torch.Tensor:
    """Return minus log-probs (U, n_true) of true tokens, ``look_ahead_weight`` x after the first, a mean over positions.

    ``valid`` (U, n_true): which of them exist. Positions that no true token follows do not count.
    """
    discount = torch.tensor([1.0] + [s.look_ahead_weight] * (s.n_true - 1), device=logprobs.device)
    followed = valid[:, 0].sum()
    return distributed.weigh(-(logprobs * discount * valid).sum() / followed.clamp_min(1), followed)


def head_nll(model, tokenizer, ids, mask, thoughts: Thoughts, s: QuietStarSettings) -> torch.Tensor:
    """Return the mixture's NLL as :func:`quiet_star_loss` takes it, for the mixing head alone to learn from.

    It is for problems that selection left out: a head that saw only thoughts that disagree would learn to doubt all.
    """
    with torch.no_grad():
        scored = rescore_thoughts(model.lm, ids, thoughts, mask, s.n_true, tuple(thinking_ids(tokenizer)))
    there, weights = thoughts.positions >= 0, model.mixing_weights(scored)
    given = weights.detach().requires_grad_()
    nll = look_ahead_nll(model.mix_truth(scored, given)[there], scored.valid[there], s)
    (slope,) = torch.autograd.grad(nll, given)  # not the language head's, which has one where states are mixed
    return nll.detach() + (cut(slope, there.sum()) * (weights - weights.detach())).sum()


def cut(slope: torch.Tensor, problems: float) -> torch.Tensor:
    """Return slopes (batch, P, n_true, 1 + K) of a mean NLL in the weights, those of a problem cut to a norm of 100.

    Where the gate is open and no thought right, they are in the thousands, and drowned all others.
    """
    norm = slope.flatten(2).norm(dim=2) * problems
    return slope * (STEEPEST / norm.clamp_min(STEEPEST))[..., None, None]


def judged_tokens(tokenizer, ids, mask, positions, s: QuietStarSettings) -> torch.Tensor:
    """Return which of the next ``n_true`` true tokens (batch, P, n_true) must be the likeliest for a right answer.

    After the question these are the answer's tokens before its closing stop: the shortest beginning of the reply that
    already gives its answer, so that neither a bare space nor a first digit decides alone. Within a text, where no
    answer begins, it is the next token. Each is judged after the true tokens before it.
    """
    judged = torch.zeros(*positions.shape, s.n_true, dtype=torch.bool, device=ids.device)
    judged[..., 0] = True
    for row, slot in (positions >= 0).nonzero().tolist() if s.think_at == "question" else ():
        last = int(mask[row].sum()) - int(ids[row, int(mask[row].sum()) - 1] == tokenizer.eos_token_id)
        reply = ids[row, positions[row, slot] + 1 : last].tolist()
        answer, count = answer_of(tokenizer, reply), 1
        while count < min(s.n_true, len(reply)) and answer_of(tokenizer, reply[:count]) != answer:
            count += 1
        judged[row, slot, :count] = True
    return judged


def reference_kls(model, reference, scored, rescore, ids, mask, thoughts) -> dict[str, torch.Tensor]:
    """Return KLs to the reference model, in nats: ``kl`` of thoughts, ``base_kl`` and ``habit_kl`` without thoughts."""
    there = thoughts.positions >= 0
    valid, units = scored.valid[there], int(there.sum())
    with torch.no_grad(), frozen(reference) as lm:
        ref = rescore(lm, ids, thoughts, mask, after=False)
        first = LanguageHead(lm)(ref.base_hidden[..., 0, :]).log_softmax(-1)
    kl = sampled_kl(scored.thought_logprobs[there], ref.thought_logprobs[there])
    drift = (forward_kl(scored.base_full, ref.base_full)[there] * valid).sum() / valid.sum().clamp_min(1)
    habit = forward_kl(LanguageHead(model.lm)(scored.base_hidden[..., 0, :]).log_softmax(-1), first)[there].mean()
    over = {"kl": (kl, units), "base_kl": (drift, valid.sum()), "habit_kl": (habit, units)}
    return {name: distributed.weigh(value, count) for name, (value, count) in over.items()}
