"""Imitation: cross-entropy on given replies. So a pretrained model learns to follow prompts, and controls are trained."""

import random

import torch

from ..data.strategies import PROMPTS
from ..data.tokens import encode_context, length_batches
from .baking import logits_at, worked_replies
from .checkpoint import Checkpoint
from .loop import scheduled, training, update
from .optim import MuonGrokfast
from .settings import BakingSettings


def learn_prompts(model, tokenizer, examples, settings: BakingSettings, prompts=PROMPTS, checkpoint=None) -> None:
    """Teach a causal LM to follow the strategies' prompts, in place: worked examples under their prompts, in plain
    words, ``prompt_epochs`` passes.

    A pretrained model needs it before :func:`qs_lib.bake`. SmolLM2-135M with three worked examples in its prompt, and
    told the equations, wrote a right thought for 1 of 16 problems.
    """
    if not settings.prompt_epochs:
        return
    worked = worked_replies(tokenizer, examples, prompts, settings.privilege)
    texts, s = [(encode_context(tokenizer, c), r) for c, r in worked], settings.but(epochs=settings.prompt_epochs)
    imitate(model, tokenizer, texts, s, desc="learn prompts", checkpoint=checkpoint)


def imitate(lm, tokenizer, texts, s: BakingSettings, score=lambda: 0.0, desc="imitate", checkpoint=None) -> list[float]:
    """Train on replies by cross-entropy, in place, and return ``score()`` after each epoch. The best weights stay.

    ``texts``: (context, reply) of each, as lists of ids. Rates, adapter and batches are those of a baking, without its
    KL. With a ``checkpoint`` a stopped training goes on where it was.
    """
    rng, order, kept = random.Random(s.seed), [], {"scores": []}
    lengths, count = [len(c) + len(r) for c, r in texts], -(-len(texts) // s.batch_size)
    steps = s.epochs * count
    with training(lm, tokenizer, s) as trained, checkpoint or Checkpoint() as saving:
        optimizer = MuonGrokfast(trained, muon_lr=s.muon_lr, adamw_lr=s.adamw_lr, grokfast_lambda=0.0, muon=s.muon)
        scheduler = scheduled(optimizer, steps, warm_up=20, constant=0.4)
        weights = [p for p in trained.parameters() if p.requires_grad]
        parts = {"model": trained, "optimizer": optimizer, "scheduler": scheduler, "rng": rng}
        parts |= {"order": order, "kept": kept}
        for step, _ in saving.steps(parts, steps, desc):
            if step % count == 0:
                order[:] = length_batches(lengths, s.batch_size, rng)
            trained.train()  # else no layer would be run again in place of being kept
            loss = _reply_loss(trained, [texts[i] for i in order[step % count]], s.bf16)
            update(loss, optimizer, scheduler, {"model": weights}, "the loss of imitation")
            trained.eval()
            if (step + 1) % count == 0:
                kept["scores"].append(score())
                if kept["scores"][-1] == max(kept["scores"]):
                    kept["weights"] = [p.detach().clone() for p in weights]
        for p, best in zip(weights, kept["weights"], strict=True):
            p.data.copy_(best)
    return kept["scores"]


def _reply_loss(lm, texts, bf16: bool) -> torch.Tensor:
    """Return the cross-entropy of the replies in nats, summed over their tokens, a mean over the texts."""
    rows, places = [c + r for c, r in texts], [range(len(c) - 1, len(c) + len(r) - 1) for c, r in texts]
    with torch.autocast(lm.device.type, torch.bfloat16, enabled=bf16):
        logits = logits_at(lm, rows, places)
    targets = torch.tensor([i for _, r in texts for i in r], device=lm.device)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / len(texts)
