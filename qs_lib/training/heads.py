"""The mixing head, fitted to thoughts of a model that is trained already."""

import copy
import random

import torch
from tqdm.auto import tqdm

from ..data.batches import think_where
from ..evaluation.accuracy import Budget
from ..thoughts.rescore import Rescored, rescore_thoughts


def fit_mixing_head(
    model, tokenizer, problems=(), texts=(), n_true=4, epochs=20, rate=1e-3, batch_size=32, places=12, **budget
) -> list[float]:
    """Fit the mixing head of a ``QuietStarForCausalLM`` to the mixture's likelihood, all else frozen, in place.

    Thoughts are drawn once: after the questions of ``problems``, where they predict the ``n_true`` next true tokens, and
    at ``places`` random tokens of whole ``texts``, where they predict the next one. In reinforcement the head sees a
    place once, by thoughts that the next step changes. Here it sees each ``epochs`` times. Every tenth batch is held
    out, and the weights that do best there stay, the first ones too. Return the held-out surprise before and after each
    epoch, in nats per token. ``rate``: AdamW's learning rate. ``budget``: see :class:`qs_lib.evaluation.accuracy.Budget`.
    """
    budget, head = Budget(**budget), model.mixing_head
    rng, generator, drawn = random.Random(budget.seed), budget.generator(), []
    for where, records, ahead in (("question", list(problems), n_true), ("random", list(texts), 1)):
        rng.shuffle(records)
        for i in tqdm(range(0, len(records), batch_size), f"thoughts, {where}", leave=False):
            batch = records[i : i + batch_size]
            drawn.append(_looked_at(model, tokenizer, batch, where, ahead, places, budget, generator))
    held, used = drawn[::10], [batch for n, batch in enumerate(drawn) if n % 10] or drawn
    weights = list(head.parameters())
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)

    def surprise(batch: Rescored) -> torch.Tensor:
        return -model.mix_truth(batch).sum() / batch.valid.sum().clamp_min(1)

    def held_out() -> float:
        with torch.no_grad():
            return sum(surprise(batch).item() for batch in held) / len(held)

    scores, best = [held_out()], copy.deepcopy(head.state_dict())
    for _ in tqdm(range(epochs), "mixing head"):
        rng.shuffle(used)
        for batch in used:
            optimizer.zero_grad()
            surprise(batch).backward(inputs=weights)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        scores.append(held_out())
        if scores[-1] == min(scores):
            best = copy.deepcopy(head.state_dict())
    head.load_state_dict(best)
    return scores


@torch.no_grad()
def _looked_at(model, tokenizer, records, where, n_true, places, budget: Budget, generator) -> Rescored:
    """Return what thoughts predict in a batch, detached: states and log-probs, no distribution over the vocabulary."""
    ids, mask, at = think_where(model.lm, tokenizer, records, where, places, generator)
    thoughts = model.think(ids, mask, at, generator, **budget.drawing, with_hidden=False)
    return rescore_thoughts(model.lm, ids, thoughts, mask, n_true, model.config.hidden_ids)
