"""What training is seen by: a validation score, and thoughts kept as episodes."""

import numpy as np
import torch

from ..data.batches import answer_batch, text_of
from ..evaluation.accuracy import accuracy_with_thoughts, answer_of
from ..evaluation.episodes import Episode, record
from ..evaluation.likelihood import text_log_likelihood

RECORDED = 4  # groups of thoughts kept as episodes at each validation, and held-out problems watched


def first_groups(model, tokenizer, batch, credit, s, stage: str) -> list[Episode]:
    """Record the first few texts' thoughts as episodes, with the reward and advantage they were trained on.

    Of a text with several positions it takes the one whose rewards differ most. ``credit``: rewards, advantages (U, K).
    """
    there, found, at_end = (batch.thoughts.positions >= 0).nonzero(), [], s.think_at == "question"
    for row, p in enumerate(batch.problems[:RECORDED]):
        units = (there[:, 0] == row).nonzero().squeeze(1)
        if not len(units):
            continue
        unit = units[(credit[0][units].amax(-1) - credit[0][units].amin(-1)).argmax()]
        slot = there[unit, 1].item()
        one = batch.thoughts.part(slice(row, row + 1), slice(slot, slot + 1))
        document, at = batch.ids[row][batch.mask[row].bool()].tolist(), one.positions.item()
        following = document[at + 1 :] if at_end else document[at + 1 : at + 1 + s.n_true]
        answer = p["answer"] if at_end else answer_of(tokenizer, following) or None
        about = {name: p[name] for name in ("question", "family", "difficulty")}
        about |= {"problem": 0, "answer": answer, "stage": stage}
        trained = [values[unit] for values in credit]
        given = {"n_true": s.n_true, "weights": mixed_by(s), "trained": trained}
        found.append(record(model, tokenizer, document, one, about, len(following), **given))
    return found


@torch.no_grad()
def watch(model, tokenizer, problems: list[dict], s, step: int) -> list[dict]:
    """Return thoughts on the first few problems as episodes (dicts) of a ``step``, after their questions.

    Every step has the same problems and random numbers: what changes is the model. The generator is a new one, so that
    training draws what it would have drawn unwatched.
    """
    budget, found = {name: getattr(s, name) for name in ("num_thoughts", "thought_length", "temperature")}, []
    for n, p in enumerate(problems[:RECORDED]):
        ids, mask, at = answer_batch(tokenizer, [p], model.device)
        thoughts = model.think(ids, mask, at, torch.Generator().manual_seed(s.seed), **budget)
        about = {name: p[name] for name in ("question", "answer", "family", "difficulty")}
        about |= {"problem": n, "stage": f"step {step}", "step": step}
        document, following = ids[0].tolist(), ids.shape[1] - at.item() - 1
        given = {"n_true": s.n_true, "weights": mixed_by(s)}
        found.append(record(model, tokenizer, document, thoughts, about, following, **given).model_dump())
    return found


def mixed_by(s) -> str:
    """Return how thoughts are mixed in training: all alike where nothing trains the mixing head."""
    return "head" if s.nll_weight else "thoughts"


def validate(model, tokenizer, problems: list[dict], s) -> tuple[str, float]:
    """Return (name, value) of what judges training: accuracy after questions or texts' log-likelihood with thoughts."""
    budget = {name: getattr(s, name) for name in ("num_thoughts", "thought_length", "temperature", "seed")}
    if s.think_at == "question":
        found = accuracy_with_thoughts(model, tokenizer, problems, mixed_by(s), **budget)
        return "validation_accuracy", found["mixed"].mean().item()
    likelihood = text_log_likelihood(model, tokenizer, [text_of(p) for p in problems], **budget)
    return "validation_log_likelihood", float(np.nanmean(likelihood["with" if s.nll_weight else "alone"]))
