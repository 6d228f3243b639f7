"""The task of Grokfast's own claim: a small network learns a + b mod p, by heart long before it generalises."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..stats import column, difference
from .arms import repeat, verdict

MODULUS = 47
SETTINGS = {"steps": 3000, "weight_decay": 1.0, "every": 50}
RATES = (3e-3, 1e-2)
FILTERED = "AdamW + Grokfast"
# the filter of Lee et al. (2024), "Grokfast", ten times as strong as in baking, behind AdamW's first moment
FILTER_LAMBDA, FILTER_ALPHA, FIRST_MOMENT = 2.0, 0.98, 0.9


def matched_momentum(momentum: float, grokfast_lambda: float, alpha: float) -> float:
    """Return the momentum whose mean lag is that of ``momentum`` behind a Grokfast filter.

    An average with factor b lags b / (1 - b) steps behind. The filter g + lambda mu adds lambda / (1 + lambda) of its
    own lag. What Grokfast does beyond a slower momentum must show against this control.
    """
    lag = momentum / (1 - momentum) + grokfast_lambda / (1 + grokfast_lambda) * alpha / (1 - alpha)
    return lag / (1 + lag)


def addition_table(seed: int, modulus: int = MODULUS):
    """Return pairs a <= b (n, 2) and their sums mod p (n,), in two halves by ``seed``: [train, validation].

    Only one of (a, b) and (b, a) is there: the network adds their embeddings, so the other would be given away.
    """
    pairs = torch.combinations(torch.arange(modulus), with_replacement=True)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    halves = order[: len(pairs) // 2], order[len(pairs) // 2 :]
    return [(pairs[half], pairs[half].sum(1) % modulus) for half in halves]


def learn_addition(settings: dict, seed: int) -> dict:
    """Train on half of the table, full batch, with AdamW behind a Grokfast-EMA filter where ``lambda`` > 0.

    Returns the curves ``steps``, ``train`` and ``validation`` (accuracy), and ``learnt`` and ``understood``: the first
    step at which training and validation accuracy are 95 %, None if they never are.
    """
    train, validation = addition_table(seed)
    torch.manual_seed(seed)
    layers = [nn.EmbeddingBag(MODULUS, 128, mode="sum"), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, MODULUS)]
    model = nn.Sequential(*layers)
    rates = {"lr": settings["lr"], "betas": (settings["momentum"], 0.98), "weight_decay": settings["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), **rates)
    slow, curves = None, {"steps": [], "train": [], "validation": []}
    for step in range(settings["steps"] + 1):
        if step % settings["every"] == 0:
            curves["steps"].append(step)
            curves["train"].append(_accuracy(model, *train))
            curves["validation"].append(_accuracy(model, *validation))
        optimizer.zero_grad()
        F.cross_entropy(model(train[0]), train[1]).backward()
        if settings["lambda"]:
            grads = [p.grad for p in model.parameters()]
            slow = slow or [g.clone() for g in grads]
            torch._foreach_lerp_(slow, grads, 1 - FILTER_ALPHA)
            torch._foreach_add_(grads, slow, alpha=settings["lambda"])
        optimizer.step()
    return {"learnt": first_step(curves, "train"), "understood": first_step(curves, "validation"), **curves}


@torch.no_grad()
def _accuracy(model, pairs: torch.Tensor, sums: torch.Tensor) -> float:
    return round((model(pairs).argmax(1) == sums).float().mean().item(), 4)


def first_step(curves: dict, key: str, level: float = 0.95) -> int | None:
    """Return the first step at which a curve is at ``level``, None if it never is."""
    return next((s for s, x in zip(curves["steps"], curves[key], strict=True) if x >= level), None)


def methods() -> dict[str, dict]:
    """Return the filter's settings and its two controls': no filter, and a first moment of AdamW as slow as it."""
    plain = SETTINGS | {"lambda": 0.0, "momentum": FIRST_MOMENT}
    slower = round(matched_momentum(FIRST_MOMENT, FILTER_LAMBDA, FILTER_ALPHA), 4)
    matched = plain | {"momentum": slower}
    return {"AdamW": plain, "AdamW, matched momentum": matched, FILTERED: plain | {"lambda": FILTER_LAMBDA}}


def grokking(run: Path, folder: Path, seeds) -> None:
    """Train with every method at every rate and the same weight decay. The models of ``run`` are not read."""
    arms = {f"{name}, rate {lr:g}": settings | {"lr": lr} for lr in RATES for name, settings in methods().items()}
    repeat(folder / "grokking.csv", arms, seeds, lambda settings, seed, _: learn_addition(settings, seed))


def best_rows(rows: list[dict]) -> list[dict]:
    """Return each method's rows at its best rate, that of the fewest steps, ``arm`` shortened to the method's name.

    Steps are those to 95 % on validation, all of them if never. The rate is chosen on the seeds shown, for all alike.
    """
    best = []
    for name in methods():
        own = [row for row in rows if row["arm"].startswith(f"{name}, rate")]
        own = [row | {"needed": row["understood"] or row["settings"]["steps"]} for row in own]
        arm = min(dict.fromkeys(row["arm"] for row in own), key=lambda arm: np.mean(column(own, arm, "needed")))
        best += [row | {"arm": name} for row in own if row["arm"] == arm]
    return best


def acceleration(rows: list[dict]) -> str:
    """Say whether the filter is faster than its controls, each at its own best rate (:func:`best_rows`)."""
    against = {name: difference(rows, name, FILTERED, "needed") for name in methods() if name != FILTERED}
    both, plain = "and not only as a slower momentum", "but no more than a slower momentum is shown to"
    verdicts = [f"the filter {words}" for words in (f"accelerates, {both}", f"accelerates, {plain}", "delays")]
    found = verdict(against, 0, (*verdicts, "no acceleration by the filter is shown"))
    return f"Steps to understand minus the filter's, over {len({row['seed'] for row in rows})} seeds: {found}."


def mean_curves(rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return the validation accuracy of each method, and the plain one's in training, as (step, mean over seeds)."""

    def mean(arm, key):
        return list(zip(column(rows, arm, "steps")[0], np.mean(column(rows, arm, key), 0).tolist(), strict=True))

    return {"AdamW, training half": mean("AdamW", "train"), **{name: mean(name, "validation") for name in methods()}}
