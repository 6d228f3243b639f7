"""Pre-training of the champion on documents written by a program."""

import random

import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data.strategies import PROMPTS, reply
from ..data.tokens import encode, length_batches, pad
from ..errors import WorkbookError
from . import distributed
from .checkpoint import Checkpoint
from .loop import scheduled, update
from .optim import MuonGrokfast
from .settings import PretrainSettings

HARD_STEPS = 3  # from so many steps on a problem is hard


def corpus(
    problems: list[dict], seed: int = 0, direct: float = 0.25, facts: float = 0.05, hard_worked: float = 1.0
) -> list[tuple[str, str]]:
    """Write pre-training documents as (context, reply) texts.

    A share ``direct`` answers without work, and a share ``facts`` is a single equation. The rest are worked solutions
    after a strategy prompt: one that fits, or, one time in four where a single one does, chain of thought. A hard
    problem keeps its worked solution with probability ``hard_worked`` and is answered directly otherwise: worked
    solutions of hard problems are rare in the wild, their answers are not. Practice goes where it is needed: a problem
    of fewer steps makes a document with probability steps / ``HARD_STEPS``.
    """
    rng, documents = random.Random(seed), []
    for problem in problems:
        if rng.random() > min(problem["difficulty"], HARD_STEPS) / HARD_STEPS:
            continue
        kind, hard = rng.random(), problem["difficulty"] >= HARD_STEPS
        if not problem["steps"] or kind < direct or (hard and rng.random() > hard_worked and kind >= direct + facts):
            documents.append((problem["question"], reply(None, problem)))
        elif kind < direct + facts:
            left, right = rng.choice(problem["steps"]).split(" = ")
            documents.append((f"{left} =", f"{right} ."))
        else:
            strategy = rng.choice(["cot", *3 * problem["fits"]])
            documents.append((f"{PROMPTS[strategy]} {problem['question']}", reply(strategy, problem)))
    return documents


def pretrain(
    model, tokenizer, documents, settings: PretrainSettings | None = None, checkpoint=None, **changed
) -> float:
    """Train ``model`` in place on (context, reply) documents and return the mean loss of the last tenth of the steps.

    The loss is next-token cross-entropy (nats), context tokens weighted by ``context_weight``. Muon + AdamW, 50 steps
    of warm-up, constant to half, then linear to 2 %. Without weight decay attention logits grow to a thousand.
    ``changed`` replaces single settings. With a ``checkpoint`` a stopped training goes on where it was.

    Raises ``WorkbookError`` on an empty corpus, ``ParameterError`` on a bad setting, ``TrainingError`` on a loss of nan.
    """
    s, documents = PretrainSettings.of(settings, **changed), list(documents)
    if not documents:
        raise WorkbookError("the champion's corpus is empty: give at least one document")
    sequences = [encode(tokenizer, *d) for d in tqdm(documents, desc="tokenise", leave=False)]
    lengths = [len(one.ids) for one in sequences]
    rates = {"muon_lr": s.muon_lr, "adamw_lr": s.adamw_lr, "weight_decay": s.weight_decay}
    optimizer = MuonGrokfast(model, **rates, grokfast_lambda=0.0)
    scheduler = scheduled(optimizer, s.steps)
    rng, queue, losses, every = random.Random(s.seed), [], [], max(1, min(50, s.steps // 10))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    parts |= {"order": rng, "queue": queue, "losses": losses}
    model.train()
    with checkpoint or Checkpoint() as saving:
        for step, bar in saving.steps(parts, s.steps, "champion"):
            queue[:] = queue or length_batches(lengths, s.batch_size, rng)
            loss = document_loss(model, tokenizer, [sequences[i] for i in queue.pop()], s.context_weight)
            clipped = {"model": model.parameters()}
            losses.append(update(loss, optimizer, scheduler, clipped, "the champion's loss")["loss"])
            if (step + 1) % every == 0 or step + 1 == s.steps:
                recent = sum(losses[-every:]) / len(losses[-every:])
                bar.set_postfix(loss=f"{recent:.3f}")
                saving.log(step=step + 1, loss=recent, lr=scheduler.get_last_lr()[0])
    model.eval()
    tail = losses[-max(1, s.steps // 10) :]
    return sum(tail) / len(tail)


def document_loss(model, tokenizer, sequences, context_weight: float):
    """Return the weighted cross-entropy of a batch of documents, over all processes."""
    chosen = distributed.share(sequences)
    ids = pad([one.ids for one in chosen], tokenizer.pad_token_id, device=model.device)
    weights = [[context_weight] * one.start + [1.0] * (len(one.ids) - one.start) for one in chosen]
    weights = pad(weights, 0.0, device=model.device)[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1]  # causal, and padded behind the text: no mask is needed
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights)
    return distributed.weigh((nll * weights).sum() / weights.sum(), weights.sum())
