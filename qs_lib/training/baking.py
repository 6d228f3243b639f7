"""Prompt baking (arXiv 2409.13697): the unprompted student learns to reply as the prompted teacher does."""

import copy
import functools
import math
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data.strategies import PROMPTS, asked
from ..data.tokens import encode_context, length_batches, mark, marker_spellings, pad, thinking_ids
from ..errors import TrainingError, WorkbookError
from ..evaluation.accuracy import reply_statistics, replies
from ..thoughts.attention import recompute_layers
from . import distributed
from .checkpoint import Checkpoint
from .distributed import check_fsdp, clip_grad_norm, shard
from .loop import add_adapter, forward_kl, frozen, schedule
from .optim import MuonGrokfast
from .qk_clip import largest_logit, watch_max_logits


@dataclass
class BakingItem:
    """One reply as teacher and student read it. ``teacher_at[j]`` and ``student_at[j]`` are the positions whose
    next-token distributions belong together; ``targets[j]`` is the student's next token there."""

    teacher_ids: list[int]
    student_ids: list[int]
    teacher_at: list[int]
    student_at: list[int]
    targets: list[int]
    ce: bool = False  # a worked example: cross-entropy beside the KL
    direct: bool = False  # an answer without thoughts: the thinking tokens are left out of both distributions
    plain: bool = False  # the teacher reads plain words for thinking tokens; its probabilities are renamed


@dataclass
class BakingResult:
    """``gap_closed`` = 1 - KL(baked) / KL(unprompted champion), both against the prompted teacher on held-out
    questions, nats per reply token; ``epochs``: one dict per epoch (the dose curve)."""

    kl_before: float
    kl_after: float
    gap_closed: float
    epochs: list[dict] = field(default_factory=list)
    seconds: float = 0.0


def thought_item(
    tokenizer, prompted: str, question: str, plain: list[int], ce: bool = False, rebake: bool = False
) -> BakingItem:
    """``plain``: reply ids in plain words, end-of-text included. The teacher reads the ``prompted`` question and these, or, in
    a ``rebake``, the thinking tokens that it has learnt itself; the student reads the question and the same reply with
    thinking tokens. The first reply token and end-of-text are among the trained positions (the paper's own code misses
    the first)."""
    context, question_ids = encode_context(tokenizer, prompted), encode_context(tokenizer, question)
    marked, last = mark(plain, marker_spellings(tokenizer))
    read, last = (marked, range(len(marked))) if rebake else (plain, last)
    return BakingItem(
        context + read,
        question_ids + marked,
        [len(context) - 1] + [len(context) + k for k in last[:-1]],
        [len(question_ids) - 1 + j for j in range(len(marked))],
        marked,
        ce,
        plain=not rebake,
    )


def direct_item(tokenizer, question: str, answer: list[int]) -> BakingItem:
    """A direct answer (ids with end-of-text) to rehearse: teacher and student read the same text."""
    context = encode_context(tokenizer, question)
    at = [len(context) - 1 + j for j in range(len(answer))]
    return BakingItem(context + answer, context + answer, at, at, answer, direct=True)


def aligned_log_probs(student, teacher, items: list[BakingItem], tokenizer) -> tuple[torch.Tensor, ...]:
    """Full-vocabulary log-probs of both at the aligned positions of all items, concatenated over items.

    Returns (student (tokens, vocab), teacher (tokens, vocab), targets (tokens,), item index (tokens,)). The teacher's
    probability of a marker word's first token is moved to the thinking token, whose own it is not asked for: it is
    exactly the champion's distribution, renamed. A re-baking teacher's is taken as it is.
    """
    new = functools.partial(torch.tensor, device=student.device)
    tags, words = new(thinking_ids(tokenizer)), new([ids[0] for ids in marker_spellings(tokenizer).values()])
    index = new([k for k, i in enumerate(items) for _ in i.targets])
    direct, plain = (new([getattr(i, kind) for i in items])[index] for kind in ("direct", "plain"))
    with torch.no_grad(), frozen(teacher) as as_it_was:
        t = _at(as_it_was, [i.teacher_ids for i in items], [i.teacher_at for i in items], tokenizer)
        no_tags = torch.zeros(t.shape[1], device=t.device).index_fill_(0, tags, -torch.inf)
        t = F.log_softmax(t + torch.where((direct | plain)[:, None], no_tags, 0.0), -1)
        renamed = t[plain]
        renamed[:, tags], renamed[:, words] = t[plain][:, words], -torch.inf
        t[plain] = renamed
    s = _at(student, [i.student_ids for i in items], [i.student_at for i in items], tokenizer)
    s = F.log_softmax(s + torch.where(direct[:, None], no_tags, 0.0), -1)
    return s, t, new([x for i in items for x in i.targets]), index


def _at(model, rows, positions, tokenizer):
    ids = pad(rows, tokenizer.pad_token_id, device=model.device)
    attention = pad([[1] * len(r) for r in rows], 0, device=model.device)
    logits = model(input_ids=ids, attention_mask=attention).logits.float()
    which = torch.tensor([k for k, p in enumerate(positions) for _ in p])
    return logits[which, torch.tensor([x for p in positions for x in p])]


def baking_loss(student, teacher, items: list[BakingItem], tokenizer, ce_weight: float = 1.0):
    """Sum over reply tokens, mean over trajectories (Eq. 3 of the paper), plus ``ce_weight`` times the cross-entropy
    of the worked examples. Returns (loss, mean KL per token)."""
    s, t, targets, index = aligned_log_probs(student, teacher, items, tokenizer)
    kl = forward_kl(s, t)
    nll = -s.gather(1, targets[:, None]).squeeze(1) * torch.tensor([float(i.ce) for i in items], device=s.device)[index]
    return (kl.sum() + ce_weight * nll.sum()) / len(items), kl.detach().mean()


def sample_trajectories(
    teacher,
    tokenizer,
    problems: list[dict],
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 48,
    rebake: bool = False,
    prompts=PROMPTS,
) -> list[BakingItem]:
    """Replies sampled from the prompted teacher, as ids, each prompt (``prompts[strategy]``) of a strategy that fits its problem.

    Replies cut off by the length limit or without a whole thought are kept out: there is nothing to align.
    ``rebake``: the teacher writes thinking tokens itself.
    """
    forbid = () if rebake else tuple(thinking_ids(tokenizer))
    contexts = [asked(p, prompts) for p in problems]
    written = replies(teacher, tokenizer, contexts, max_new_tokens, forbid, temperature, seed=seed, desc="teacher")
    start, end = thinking_ids(tokenizer)[:2]
    items = []
    for context, problem, reply in zip(contexts, problems, written, strict=True):
        marked, _ = mark(reply, marker_spellings(tokenizer))
        if marked and marked[0] == start and end in marked:
            reply = reply + [tokenizer.eos_token_id]
            items.append(thought_item(tokenizer, context, problem["question"], reply, rebake=rebake))
    return items


def bake(
    model,
    tokenizer,
    examples,
    problems,
    validation,
    epochs: int = 6,
    batch_size: int = 32,
    muon_lr: float = 6e-3,
    adamw_lr: float = 1.5e-3,
    grokfast_lambda: float = 0.2,
    ce_weight: float = 1.0,
    trajectories: int = 1800,
    rehearsal: float = 0.25,
    patience: int = 0,
    lora_rank: int = 0,
    rebake: bool = False,
    qk_clip_threshold: float | None = None,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    fsdp: bool = False,
    seed: int = 0,
    max_new_tokens: int = 48,
    prompts: dict[str, str] = PROMPTS,
    optimizer=None,
    log=lambda **metrics: None,
    on_epoch=lambda epoch, model: None,
    checkpoint: Checkpoint | None = None,
) -> BakingResult:
    """Bake the strategies' prompts into ``model`` (in place); the teacher is a frozen copy made first, or, with an adapter, the
    model without it.

    ``examples``: worked examples (:func:`qs_lib.reasoning_dataset`), trained by KL and cross-entropy; ``problems``:
    training records for ``trajectories`` sampled from the prompted teacher (KL only) and for ``rehearsal`` x batch
    direct answers (KL to the champion on its own greedy answers, thinking tokens left out), which keep the model able
    to answer without thoughts; ``validation``: held-out records for the dose curve. ``prompts``: strategy -> what the teacher is
    asked with, ``strategies.prompts_with`` for one that was not trained on ``PROMPTS``.

    ``on_epoch(epoch, model)`` sees every half-baked model, with ``lora_rank`` as a peft model whose ``save_pretrained``
    writes the adapter alone. ``patience``: after so many epochs without a lower held-out KL stop, and go back to the
    epoch where it was lowest (0: all epochs, the last one stays). ``lora_rank``: train an adapter of that rank
    and the eight token rows, merged at the end; 0 trains all weights. ``rebake``: ``model`` is baked already, so the
    teacher, a copy of it, writes and reads thinking tokens itself. ``qk_clip_threshold``: see :class:`MuonGrokfast`;
    each epoch reports the largest attention logit on held-out text, ``max_logit`` (with an adapter the teacher's passes count too; left out
    for a family that cannot be watched). ``optimizer``: made from the model by this function in place of :class:`MuonGrokfast`. ``gradient_checkpointing``: keep only what goes into each layer and run it
    again in the backward pass; ``bf16``: autocast, the weights stay as they are. ``fsdp``: ``model`` and teacher are sharded over the processes and stay
    so (``sharding``). With a ``checkpoint``, whose log then counts, a stopped training
    goes on where it was; finished epochs are not shown to ``on_epoch`` again.

    Raises ``WorkbookError`` when no teacher reply holds a thought, or the family's attention cannot be clipped, ``TrainingError``
    on a non-finite loss.
    """
    started, rng = time.monotonic(), random.Random(seed)
    check_fsdp(fsdp, checkpoint, lora_rank)
    if qk_clip_threshold:
        with watch_max_logits(model):  # a family that cannot be watched is refused before anything is sampled
            pass
    teacher = model.eval() if lora_rank else copy.deepcopy(model).eval().requires_grad_(False)
    if fsdp:
        shard(teacher)
        shard(model)
    items = [
        thought_item(
            tokenizer,
            asked({**e, "fits": [e["strategy"]]}, prompts),
            e["question"],
            tokenizer.encode(" " + e["reply"], add_special_tokens=False) + [tokenizer.eos_token_id],
            True,
            rebake,
        )
        for e in examples
    ]
    sampling = {"max_new_tokens": max_new_tokens, "rebake": rebake, "prompts": prompts}
    items += sample_trajectories(teacher, tokenizer, list(problems)[:trajectories], seed=seed, **sampling)
    share = max(1, round(batch_size * rehearsal)) if rehearsal else 0
    rehearsed = (
        [p["question"] for p in list(problems)[-(len(items) * share // batch_size + batch_size) :]] if share else []
    )
    answers = (
        replies(teacher, tokenizer, rehearsed, 8, tuple(thinking_ids(tokenizer)), desc="rehearsal") if share else []
    )
    direct = [direct_item(tokenizer, q, a + [tokenizer.eos_token_id]) for q, a in zip(rehearsed, answers, strict=True)]
    held = sample_trajectories(teacher, tokenizer, list(validation)[:240], seed=seed + 1, **sampling)
    if not held:
        raise WorkbookError("the prompted teacher writes no thought on held-out questions: train the champion longer")
    before = held_out_kl(teacher, teacher, tokenizer, held) if rebake else unprompted_kl(teacher, tokenizer, held)

    trained = add_adapter(model, tokenizer, lora_rank) if lora_rank else model
    if lora_rank:
        teacher = trained  # without its adapter, see `frozen`: no second copy of the weights
    if gradient_checkpointing:
        recompute_layers(model)
    qk_clip_threshold = qk_clip_threshold or None
    if optimizer is None:
        optimizer = MuonGrokfast(
            trained,
            muon_lr=muon_lr,
            adamw_lr=adamw_lr,
            grokfast_lambda=grokfast_lambda,
            qk_clip_threshold=qk_clip_threshold,
        )
    else:
        optimizer = optimizer(trained)
    lengths = [len(i.student_ids) for i in items]
    batches = math.ceil(len(items) / (batch_size - share))
    steps = epochs * batches
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(k, steps, 20, constant=0.4))
    result = BakingResult(before, math.nan, math.nan)
    weights = [p for p in trained.parameters() if p.requires_grad]
    order, best = [], {"epoch": 0, "weights": [], "stop": False}
    parts = {
        "model": trained,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "rng": rng,
        "order": order,
        "epochs": result.epochs,
        "best": best,
    }
    with checkpoint or Checkpoint(log=log) as saving:
        distributed.check_equal(trained, "before training")
        step = saving.resume(parts)
        bar = tqdm(total=steps, initial=step, desc="bake", disable=not distributed.first())
        while step < steps and not best["stop"]:
            epoch = step // batches + 1
            trained.train()
            with nullcontext() if qk_clip_threshold is None else watch_max_logits(trained) as optimizer.watch:
                for at in range(step % batches, batches):
                    if at == 0:
                        order[:] = length_batches(lengths, batch_size - share, rng)
                    chosen = distributed.share([items[i] for i in order[at]] + rng.sample(direct, share))
                    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                        loss, kl = baking_loss(trained, teacher, chosen, tokenizer, ce_weight)
                    loss = distributed.weigh(loss, len(chosen))
                    value = distributed.mean(loss.item())
                    if not math.isfinite(value):
                        raise TrainingError(f"the baking loss is {value} at step {step}: lower the learning rates")
                    loss.backward()
                    distributed.average(weights)
                    clip_grad_norm(weights, 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    step += 1
                    bar.update()
                    if step % max(1, min(20, steps // 10)) == 0:
                        saving.log(step=step, epoch=epoch, loss=value, kl=distributed.mean(kl.item()))
                    if at + 1 < batches:
                        saving.after(step, parts)
            trained.eval()
            with largest_logit(trained) as largest:
                dose = {"epoch": epoch, "kl": held_out_kl(trained, teacher, tokenizer, held)}
            dose |= largest | reply_statistics(trained, tokenizer, list(validation), max_new_tokens)
            result.epochs.append(dose)
            saving.log(step=step, **dose)
            bar.set_postfix(accuracy=f"{dose['accuracy']:.3f}", use=f"{dose['thinking_use']:.2f}")
            if distributed.first():
                on_epoch(epoch, trained)
            if patience and (not best["epoch"] or dose["kl"] < result.epochs[best["epoch"] - 1]["kl"]):
                best.update(epoch=epoch, weights=[p.detach().clone() for p in weights])
            best["stop"] = bool(patience) and epoch - best["epoch"] >= patience
            saving.after(step, parts, last=best["stop"] or step == steps)
        bar.close()
    trained.eval()
    distributed.check_equal(trained, "after training")
    for p, kept in zip(weights, best["weights"], strict=False):  # none are kept without patience
        p.data.copy_(kept)
    if lora_rank:
        trained.merge_and_unload().requires_grad_(True)
    result.kl_after = result.epochs[best["epoch"] - 1]["kl"]
    result.gap_closed, result.seconds = 1 - result.kl_after / before, time.monotonic() - started
    return result


@torch.no_grad()
def held_out_kl(student, teacher, tokenizer, items: list[BakingItem], batch_size: int = 120) -> float:
    """Mean KL per reply token of the student (unprompted) from the prompted teacher."""
    total = [
        forward_kl(*aligned_log_probs(student, teacher, items[i : i + batch_size], tokenizer)[:2])
        for i in range(0, len(items), batch_size)
    ]
    return torch.cat(total).mean().item()


@torch.no_grad()
def unprompted_kl(teacher, tokenizer, items: list[BakingItem], batch_size: int = 120) -> float:
    """The gap baking has to close: the same KL for the champion itself, reading the same plain words unprompted."""
    total = []
    tags = thinking_ids(tokenizer)
    for i in range(0, len(items), batch_size):
        part = items[i : i + batch_size]
        prompted = _at(teacher, [x.teacher_ids for x in part], [x.teacher_at for x in part], tokenizer)
        cut = [x.teacher_at[0] - x.student_at[0] for x in part]  # length of the prompt
        head = [x.student_ids[: x.student_at[0] + 1] for x in part]
        rows = [h + x.teacher_ids[x.teacher_at[0] + 1 :] for h, x in zip(head, part, strict=True)]
        bare = _at(teacher, rows, [[k - c for k in x.teacher_at] for x, c in zip(part, cut, strict=True)], tokenizer)
        for logits in (prompted, bare):
            logits[:, tags] = -torch.inf
        total.append(forward_kl(F.log_softmax(bare, -1), F.log_softmax(prompted, -1)))
    return torch.cat(total).mean().item()
