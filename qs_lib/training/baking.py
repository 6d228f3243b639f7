"""Prompt baking (arXiv 2409.13697): the unprompted student learns to reply as the prompted teacher does."""

import copy
import functools
import math
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data.strategies import PROMPTS, asked
from ..data.tokens import encode_context, encode_reply, length_batches, mark, marker_spellings, thinking_ids
from ..errors import WorkbookError
from ..evaluation.accuracy import replies, reply_statistics, sorted_batches
from ..thoughts.attention import LanguageHead
from ..thoughts.beginnings import row_states
from . import distributed
from .checkpoint import Checkpoint
from .loop import forward_kl, frozen, scheduled, training, update
from .optim import MuonGrokfast
from .qk_clip import largest_logit, watch_max_logits
from .settings import BakingSettings

HELD_OUT = 240  # validation problems that the gap to the teacher is measured on, at most


@dataclass
class BakingItem:
    """One reply as teacher and student read it.

    ``teacher_at[j]`` and ``student_at[j]`` are the positions whose next-token distributions belong together, and
    ``targets[j]`` is the student's next token there. A ``ce`` item is a worked example: cross-entropy beside the KL. A
    ``direct`` item is an answer without thoughts, read by both alike. ``states`` (tokens, hidden): the teacher's final
    states at these positions, once :func:`keep_states` has read them.
    """

    teacher_ids: list[int]
    student_ids: list[int]
    teacher_at: list[int]
    student_at: list[int]
    targets: list[int]
    ce: bool = False
    direct: bool = False
    states: torch.Tensor | None = None


@dataclass
class BakingResult:
    """What baking did. ``gap_closed`` = 1 - KL(baked) / KL(unprompted champion).

    Both KLs are from the prompted teacher, on held-out questions, in nats per reply token. ``epochs``: the dose curve.
    """

    kl_before: float
    kl_after: float
    gap_closed: float
    epochs: list[dict] = field(default_factory=list)
    seconds: float = 0.0


class Lessons(NamedTuple):
    """What is learnt: replies with thoughts, and direct answers to rehearse. Held-out replies are only measured."""

    thoughts: list[BakingItem]
    direct: list[BakingItem]
    held_out: list[BakingItem]


def thought_item(tokenizer, context: str, question: str, plain: list[int], ce: bool = False) -> BakingItem:
    """Align a reply, ``plain`` ids in plain words with end-of-text, as teacher and student read it.

    The teacher reads ``context``, the prompted question, and plain words, the student the question and the same reply with
    thinking tokens. First reply token and end-of-text are trained on too (the paper's own code misses the first).
    """
    context, asked_ids = encode_context(tokenizer, context), encode_context(tokenizer, question)
    marked, last = mark(plain, marker_spellings(tokenizer))
    teacher_at = [len(context) - 1] + [len(context) + k for k in last[:-1]]
    student_at = [len(asked_ids) - 1 + j for j in range(len(marked))]
    return BakingItem(context + plain, asked_ids + marked, teacher_at, student_at, marked, ce)


def direct_item(tokenizer, question: str, answer: list[int]) -> BakingItem:
    """Align a direct answer (ids with end-of-text) to rehearse: teacher and student read the same text."""
    context = encode_context(tokenizer, question)
    at = [len(context) - 1 + j for j in range(len(answer))]
    return BakingItem(context + answer, context + answer, at, at, answer, direct=True)


def aligned_log_probs(student, teacher, items: list[BakingItem], tokenizer) -> tuple[torch.Tensor, ...]:
    """Return the log-probs of both at the aligned positions of all items, one item after the other.

    These are student (tokens, vocab), teacher (tokens, vocab), targets (tokens,) and item index (tokens,). The teacher
    never writes thinking tokens. Its probability of a marker word's first token is moved to the thinking token: it is
    exactly the champion's distribution, renamed. In direct answers neither writes thinking tokens.
    """
    new = functools.partial(torch.tensor, device=student.device)
    tags, words = new(thinking_ids(tokenizer)), new([ids[0] for ids in marker_spellings(tokenizer).values()])
    index = new([k for k, item in enumerate(items) for _ in item.targets])
    direct = new([item.direct for item in items])[index]
    with torch.no_grad(), frozen(teacher) as as_it_was:
        t = _teacher_logits(as_it_was, items).to(student.device)
        no_tags = torch.zeros(t.shape[1], device=t.device).index_fill_(0, tags, -torch.inf)
        t = F.log_softmax(t + no_tags, -1)
        renamed = t[~direct]
        renamed[:, tags], renamed[:, words] = t[~direct][:, words], -torch.inf
        t[~direct] = renamed
    s = logits_at(student, [i.student_ids for i in items], [i.student_at for i in items])
    s = F.log_softmax(s + torch.where(direct[:, None], no_tags, 0.0), -1)
    return s, t, new([x for i in items for x in i.targets]), index


@torch.no_grad()
def keep_states(teacher, items: list[BakingItem], batch_size: int = 64) -> None:
    """Read what the teacher says at the items' positions, once. Its head gives the exact distribution back."""
    batches = sorted_batches([len(i.teacher_ids) for i in items], batch_size)
    for rows in tqdm(batches, desc="teacher's states", leave=False, delay=2):
        part = [items[k] for k in rows]
        found = row_states(teacher, [i.teacher_ids for i in part], [i.teacher_at for i in part])
        for item, states in zip(part, found.split([len(i.targets) for i in part]), strict=True):
            item.states = states.float().cpu()


def _teacher_logits(teacher, items: list[BakingItem]):
    """Return the teacher's logits (tokens, vocab) at the items' positions, from the states that were kept if they were."""
    kept = [i.states for i in items]
    if any(states is None for states in kept):
        return logits_at(teacher, [i.teacher_ids for i in items], [i.teacher_at for i in items])
    return LanguageHead(teacher)(torch.cat(kept).to(teacher.device))


def logits_at(model, rows: list[list[int]], positions: list[list[int]]) -> torch.Tensor:
    """Return the logits (tokens, vocab) of the model's own head at ``positions`` of each row, one after the other."""
    return LanguageHead(model)(row_states(model, rows, positions))


def baking_loss(student, teacher, items: list[BakingItem], tokenizer, ce_weight: float = 1.0):
    """Return (loss, mean KL per token in nats) of a batch.

    The KL is summed over reply tokens, with a mean over trajectories (Eq. 3 of the paper), plus ``ce_weight`` times the
    cross-entropy of the worked examples.
    """
    s, t, targets, index = aligned_log_probs(student, teacher, items, tokenizer)
    kl = forward_kl(s, t)
    nll = -s.gather(1, targets[:, None]).squeeze(1) * torch.tensor([float(i.ce) for i in items], device=s.device)[index]
    return (kl.sum() + ce_weight * nll.sum()) / len(items), kl.detach().mean()


def sample_trajectories(
    teacher, tokenizer, problems, max_new_tokens=48, prompts=PROMPTS, privilege="none", seed=0
) -> list[BakingItem]:
    """Sample a reply to each problem from the prompted teacher, with the prompt of a strategy that fits.

    Replies cut off by the length limit or without a whole thought are left out: there is nothing to align.
    """
    start, end, *_ = tags = thinking_ids(tokenizer)
    contexts = prompted(problems, prompts, privilege)
    written = replies(teacher, tokenizer, contexts, max_new_tokens, tuple(tags), 1.0, seed=seed, desc="teacher")
    items = []
    for context, problem, plain in zip(contexts, problems, written, strict=True):
        item = thought_item(tokenizer, context, problem["question"], [*plain, tokenizer.eos_token_id])
        if item.targets[0] == start and end in item.targets:
            items.append(item)
    return items


def prompted(problems, prompts, privilege="none") -> list[str]:
    """Return what the teacher reads of each problem: its prompt, the question and, if privileged, equations.

    Those of the problem itself, or ``foreign`` ones, those of the problem before it: the control.
    """
    if privilege == "none":
        return [asked(p, prompts) for p in problems]
    source = problems if privilege == "equation" else [*problems[-1:], *problems[:-1]]
    return [asked(p, prompts, told["steps"]) for p, told in zip(problems, source, strict=True)]


def worked_replies(tokenizer, examples, prompts, privilege="none") -> list[tuple[str, list[int]]]:
    """Return what a teacher reads of each worked example, and its reply: ids of plain words with end-of-text."""
    contexts = prompted([{**e, "fits": [e["strategy"]]} for e in examples], prompts, privilege)
    end = [tokenizer.eos_token_id]
    return [(c, encode_reply(tokenizer, e["reply"]) + end) for c, e in zip(contexts, examples, strict=True)]


def lessons(teacher, tokenizer, examples, problems, validation, s: BakingSettings, prompts=PROMPTS) -> Lessons:
    """Prepare all that is learnt and measured. Raises ``WorkbookError`` if a part of it is empty.

    Worked ``examples`` and sampled trajectories are learnt. The last ``problems`` get the teacher's direct answers.
    """
    end, problems = [tokenizer.eos_token_id], list(problems)
    worked = zip(examples, worked_replies(tokenizer, examples, prompts, s.privilege), strict=True)
    thoughts = [thought_item(tokenizer, asked, e["question"], plain, ce=True) for e, (asked, plain) in worked]
    sampling = {"max_new_tokens": s.max_new_tokens, "prompts": prompts, "privilege": s.privilege}
    thoughts += sample_trajectories(teacher, tokenizer, problems[: s.trajectories], seed=s.seed, **sampling)
    direct, share = [], s.rehearsed
    if share > len(problems):
        raise WorkbookError(f"rehearsal needs {share} training problems, {len(problems)} were given: or set it to 0")
    if share:
        questions = [p["question"] for p in problems[-(len(thoughts) * share // s.batch_size + s.batch_size) :]]
        answers = replies(teacher, tokenizer, questions, 8, tuple(thinking_ids(tokenizer)), desc="rehearsal")
        direct = [direct_item(tokenizer, q, a + end) for q, a in zip(questions, answers, strict=True)]
    held_out = sample_trajectories(teacher, tokenizer, validation[:HELD_OUT], seed=s.seed + 1, **sampling)
    if not held_out:
        advice = "train the champion longer, or teach a pretrained one its prompts (prompt_epochs, examples)"
        raise WorkbookError(f"the prompted teacher writes no thought on held-out questions: {advice}")
    if not thoughts:
        raise WorkbookError("there is nothing to bake: give worked examples, or problems and trajectories above 0")
    keep_states(teacher, [*thoughts, *direct, *held_out])
    return Lessons(thoughts, direct, held_out)


# Its documentation makes it longer than sixty lines: the loop stays in one piece, and ``changed`` is no parameter more.
def bake(
    model,
    tokenizer,
    examples,
    problems,
    validation,
    settings: BakingSettings | None = None,
    prompts=PROMPTS,
    optimizer=None,
    on_epoch=lambda epoch, model: None,
    checkpoint: Checkpoint | None = None,
    **changed,
) -> BakingResult:
    """Bake the strategies' prompts into ``model``, in place, from a frozen copy, or from itself without its adapter.

    ``examples``: worked examples (:func:`qs_lib.reasoning_dataset`), learnt by KL and cross-entropy. ``problems``:
    training records, for trajectories sampled from the prompted teacher (KL only) and for direct answers (KL to the
    champion on its own greedy answers), which keep the model able to answer without thoughts. ``validation``: held-out
    records for the dose curve. ``prompts``: strategy -> prompt, see ``strategies.prompts_with``. ``changed`` replaces
    single settings. ``prompt_epochs`` is not read here: :func:`qs_lib.learn_prompts` comes before.

    ``optimizer(model)`` makes another optimizer than :class:`MuonGrokfast`. ``on_epoch(epoch, model)`` sees every
    half-baked model, with an adapter as a peft model. With a ``checkpoint`` a stopped training goes on where it was.
    Finished epochs are not shown to ``on_epoch`` again.

    Raises ``WorkbookError`` if there is nothing to learn or to measure, or the family's attention cannot be clipped,
    ``ParameterError`` on a bad setting, ``TrainingError`` on a non-finite loss.
    """
    s, started, validation = BakingSettings.of(settings, **changed), time.monotonic(), list(validation)
    if not validation:
        raise WorkbookError("baking needs at least one validation problem")
    if s.qk_clip_threshold:
        with watch_max_logits(model):  # a family that cannot be watched is refused before anything is sampled
            pass
    teacher = model.eval() if s.lora_rank else copy.deepcopy(model).eval().requires_grad_(False)
    data = lessons(teacher, tokenizer, examples, problems, validation, s, prompts)
    before = held_out_kl(teacher, teacher, tokenizer, [unprompted(item) for item in data.held_out])
    rng, lengths, size = random.Random(s.seed), [len(i.student_ids) for i in data.thoughts], s.batch_size - s.rehearsed
    batches = math.ceil(len(lengths) / size)
    steps, order, result = s.epochs * batches, [], BakingResult(before, math.nan, math.nan)
    with training(model, tokenizer, s) as trained, checkpoint or Checkpoint() as saving:
        if s.lora_rank:  # without its adapter, see `frozen`: no second copy of the weights
            teacher = trained
        optimizer = optimizer(trained) if optimizer else _muon_grokfast(trained, s)
        scheduler = scheduled(optimizer, steps, warm_up=20, constant=0.4)
        parts = {"model": trained, "optimizer": optimizer, "scheduler": scheduler, "rng": rng}
        parts |= {"order": order, "epochs": result.epochs}
        for step, bar in saving.steps(parts, steps, "bake"):
            epoch, at = step // batches + 1, step % batches
            if at == 0:
                order[:] = length_batches(lengths, size, rng)
            batch = [data.thoughts[i] for i in order[at]] + rng.sample(data.direct, s.rehearsed)
            taken = baking_step(trained, teacher, tokenizer, batch, optimizer, scheduler, s)
            if (step + 1) % max(1, min(20, steps // 10)) == 0:
                saving.log(step=step + 1, epoch=epoch, **taken)
            if at + 1 == batches:
                with largest_logit(trained) as largest:
                    kl = held_out_kl(trained, teacher, tokenizer, data.held_out)
                dose = {"epoch": epoch, "kl": kl} | largest
                dose |= reply_statistics(trained, tokenizer, validation, s.max_new_tokens)
                result.epochs.append(dose)
                saving.log(step=step + 1, **dose)
                bar.set_postfix(accuracy=f"{dose['accuracy']:.3f}", use=f"{dose['thinking_use']:.2f}")
                if distributed.first():
                    on_epoch(epoch, trained)
    result.kl_after = result.epochs[-1]["kl"]
    result.gap_closed, result.seconds = 1 - result.kl_after / before, time.monotonic() - started
    return result


def _muon_grokfast(model, s: BakingSettings) -> MuonGrokfast:
    rates = {"muon_lr": s.muon_lr, "adamw_lr": s.adamw_lr, "grokfast_lambda": s.grokfast_lambda}
    return MuonGrokfast(model, **rates, qk_clip_threshold=s.qk_clip_threshold or None, muon=s.muon)


def baking_step(trained, teacher, tokenizer, batch: list[BakingItem], optimizer, scheduler, s) -> dict[str, float]:
    """Take one step on a global batch. Return what :func:`update` does, and the mean ``kl`` per token in nats."""
    trained.train()
    mine = distributed.share(batch)
    with watch_max_logits(trained) if s.qk_clip_threshold else nullcontext() as optimizer.watch:
        with torch.autocast(trained.device.type, torch.bfloat16, enabled=s.bf16):
            loss, kl = baking_loss(trained, teacher, mine, tokenizer, s.ce_weight)
        loss = distributed.weigh(loss, len(mine))
        taken = update(loss, optimizer, scheduler, {"model": trained.parameters()}, "the baking loss")
    trained.eval()
    return taken | {"kl": distributed.mean(kl.item())}


@torch.no_grad()
def held_out_kl(student, teacher, tokenizer, items: list[BakingItem]) -> float:
    """Return the mean KL (nats per reply token) of the student (unprompted) from the prompted teacher."""
    parts = [items[i : i + 120] for i in range(0, len(items), 120)]
    total = [forward_kl(*aligned_log_probs(student, teacher, part, tokenizer)[:2]) for part in parts]
    return torch.cat(total).mean().item()


def unprompted(item: BakingItem) -> BakingItem:
    """Return the item as the champion reads it without a prompt, in the same plain words: the gap to close."""
    prompt = item.teacher_at[0] - item.student_at[0]  # its length
    ids = item.student_ids[: item.student_at[0] + 1] + item.teacher_ids[item.teacher_at[0] + 1 :]
    return replace(item, student_ids=ids, student_at=[k - prompt for k in item.teacher_at], direct=True)
