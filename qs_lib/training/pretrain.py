import math
import random

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data.strategies import PROMPTS, reply
from ..data.tokens import encode, length_batches, pad
from ..errors import TrainingError, WorkbookError
from . import distributed
from .checkpoint import Checkpoint
from .distributed import check_fsdp, clip_grad_norm, shard
from .loop import schedule
from .optim import MuonGrokfast


def corpus(
    problems: list[dict],
    seed: int = 0,
    direct: float = 0.25,
    facts: float = 0.05,
    hard_worked: float = 1.0,
    hard_from: int = 3,
) -> list[tuple[str, str]]:
    """Pre-training documents as (context, reply) texts.

    Shares: ``direct`` answers without work, bare ``facts`` (single equations), the rest worked solutions after a
    strategy prompt (one that fits, or, one time in four where a single one does, chain of thought). A problem of ``hard_from`` steps or more keeps its
    worked solution with probability ``hard_worked`` and is answered directly otherwise: worked solutions of hard
    problems are rare in the wild, their answers are not. Practice goes where it is needed: a problem of fewer than
    ``hard_from`` steps makes a document with probability steps / ``hard_from``.
    """
    rng, documents = random.Random(seed), []
    for problem in problems:
        if rng.random() > min(problem["difficulty"], hard_from) / hard_from:
            continue
        kind, hard = rng.random(), problem["difficulty"] >= hard_from
        if not problem["steps"] or kind < direct or (hard and rng.random() > hard_worked and kind >= direct + facts):
            documents.append((problem["question"], reply(None, problem)))
        elif kind < direct + facts:
            equation = rng.choice(problem["steps"])
            documents.append((equation.split(" = ")[0] + " =", equation.split(" = ")[1] + " ."))
        else:
            strategy = rng.choice(["cot", *3 * problem["fits"]])
            documents.append((f"{PROMPTS[strategy]} {problem['question']}", reply(strategy, problem)))
    return documents


def pretrain(
    model,
    tokenizer,
    documents: list[tuple[str, str]],
    steps: int,
    batch_size: int = 32,
    muon_lr: float = 0.02,
    adamw_lr: float = 3e-3,
    weight_decay: float = 0.1,
    context_weight: float = 0.1,
    fsdp: bool = False,
    seed: int = 0,
    log=lambda **metrics: None,
    checkpoint: Checkpoint | None = None,
):
    """Train ``model`` in place on the documents for a fixed number of steps; returns the mean loss of the last tenth.
    With a ``checkpoint``, whose log then counts, a stopped training goes on where it was. ``fsdp``: the model is sharded over
    the processes, and stays so (``sharding``).

    Next-token cross-entropy, context tokens weighted by ``context_weight``. Muon + AdamW, 50 steps of warm-up, constant
    to half, then linear to 2 %. Without ``weight_decay`` (decoupled) attention logits grow to a thousand. Raises
    ``WorkbookError`` on an empty corpus, ``TrainingError`` on a non-finite loss.
    """
    if not documents:
        raise WorkbookError("the champion's corpus is empty: give at least one document")
    check_fsdp(fsdp, checkpoint)
    if fsdp:
        shard(model)
    sequences = [encode(tokenizer, *d) for d in tqdm(documents, desc="tokenise", leave=False)]
    lengths = [len(s.ids) for s in sequences]
    optimizer = MuonGrokfast(model, muon_lr=muon_lr, adamw_lr=adamw_lr, weight_decay=weight_decay, grokfast_lambda=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(k, steps))
    rng, queue, losses, every = random.Random(seed), [], [], max(1, min(50, steps // 10))
    model.train()
    distributed.check_equal(model, "before training")
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "order": rng,
        "queue": queue,
        "losses": losses,
    }
    with checkpoint or Checkpoint(log=log) as saving:
        first = saving.resume(parts)
        for step in (
            bar := tqdm(
                range(first, steps), desc="champion", initial=first, total=steps, disable=not distributed.first()
            )
        ):
            queue[:] = queue or length_batches(lengths, batch_size, rng)
            chosen = distributed.share([sequences[i] for i in queue.pop()])
            ids = pad([s.ids for s in chosen], tokenizer.pad_token_id, device=model.device)
            weights = [[context_weight] * s.start + [1.0] * (len(s.ids) - s.start) for s in chosen]
            weights = pad(weights, 0.0, device=model.device)[:, 1:]
            logits = model(input_ids=ids).logits[:, :-1]  # causal, and padded behind the text: no mask is needed
            nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights)
            loss = distributed.weigh((nll * weights).sum() / weights.sum(), weights.sum())
            value = distributed.mean(loss.item())
            if not math.isfinite(value):
                raise TrainingError(f"the champion's loss is {value} at step {step}: lower the learning rates")
            loss.backward()
            distributed.average(model.parameters())
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(value)
            if (step + 1) % every == 0 or step == steps - 1:
                recent = sum(losses[-every:]) / len(losses[-every:])
                bar.set_postfix(loss=f"{recent:.3f}")
                saving.log(step=step + 1, loss=recent, lr=scheduler.get_last_lr()[0])
            saving.after(step + 1, parts, last=step == steps - 1)
    model.eval()
    distributed.check_equal(model, "after training")
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
