"""Where Grokfast's own claim lives: a small network learns a + b mod p, by heart long before it understands."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..stats import difference
from .arms import repeat, verdict

MODULUS = 47
SETTINGS = {"steps": 3000, "weight_decay": 1.0, "every": 50}
RATES = (3e-3, 1e-2)
FILTERED = "AdamW + Grokfast"
LAMBDA, ALPHA, MOMENTUM = 2.0, 0.98, 0.9  # the authors' own filter, ten times as strong as in baking


def matched_momentum(momentum: float, grokfast_lambda: float, alpha: float) -> float:
    """The momentum whose mean lag is that of ``momentum`` behind a Grokfast filter.

    An average with factor b lags b / (1 - b) steps behind; the filter g + lambda mu adds lambda / (1 + lambda) of its
    own lag. What Grokfast does beyond a slower momentum must show against this control.
    """
    lag = momentum / (1 - momentum) + grokfast_lambda / (1 + grokfast_lambda) * alpha / (1 - alpha)
    return lag / (1 + lag)


def addition_table(seed: int, modulus: int = MODULUS):
    """Pairs a <= b, (n, 2), and their sums mod p, (n,), in two halves by ``seed``: (train, validation).

    Only one of (a, b) and (b, a) is there: the network adds their embeddings, so the other would be given away.
    """
    pairs = torch.combinations(torch.arange(modulus), with_replacement=True)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    halves = order[: len(pairs) // 2], order[len(pairs) // 2 :]
    return [(pairs[half], pairs[half].sum(1) % modulus) for half in halves]


def learn_addition(settings: dict, seed: int) -> dict:
    """Train on half of the table, full batch, AdamW, the Grokfast-EMA filter before it where ``lambda`` > 0.

    Returns the curves ``steps``, ``train``, ``validation`` (accuracy), and ``learnt``, ``understood``: the first step
    at which training and validation accuracy are 95 % (None if never).
    """
    (pairs, sums), (new_pairs, new_sums) = addition_table(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.EmbeddingBag(MODULUS, 128, mode="sum"), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, MODULUS)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["lr"], betas=(settings["momentum"], 0.98), weight_decay=settings["weight_decay"]
    )
    slow = None
    curves = {"steps": [], "train": [], "validation": []}
    for step in range(settings["steps"] + 1):
        logits = model(pairs)
        if step % settings["every"] == 0:
            with torch.no_grad():
                curves["steps"].append(step)
                curves["train"].append(round((logits.argmax(1) == sums).float().mean().item(), 4))
                curves["validation"].append(round((model(new_pairs).argmax(1) == new_sums).float().mean().item(), 4))
        optimizer.zero_grad()
        F.cross_entropy(logits, sums).backward()
        if settings["lambda"]:
            grads = [p.grad for p in model.parameters()]
            slow = slow or [g.clone() for g in grads]
            torch._foreach_lerp_(slow, grads, 1 - ALPHA)
            torch._foreach_add_(grads, slow, alpha=settings["lambda"])
        optimizer.step()
    return {"learnt": first(curves, "train"), "understood": first(curves, "validation"), **curves}


def first(curves: dict, key: str, level: float = 0.95) -> int | None:
    """The first step at which a curve is at ``level``."""
    return next((s for s, x in zip(curves["steps"], curves[key], strict=True) if x >= level), None)


def methods() -> dict[str, dict]:
    """The filter, and what it is held against: nothing, and a first moment in AdamW as slow as the filter makes it."""
    plain = SETTINGS | {"lambda": 0.0, "momentum": MOMENTUM}
    return {
        "AdamW": plain,
        "AdamW, matched momentum": plain | {"momentum": round(matched_momentum(MOMENTUM, LAMBDA, ALPHA), 4)},
        FILTERED: plain | {"lambda": LAMBDA},
    }


def grokking(run: Path, folder: Path, seeds) -> None:
    """Every method at every rate, with the same weight decay; the models of ``run`` are not read."""
    arms = {f"{name}, rate {lr:g}": settings | {"lr": lr} for lr in RATES for name, settings in methods().items()}
    repeat(folder / "grokking.csv", arms, seeds, lambda settings, seed, _: learn_addition(settings, seed))


def best_rows(rows: list[dict]) -> list[dict]:
    """The rows of each method at the rate with which it understands soonest, ``arm`` shortened to the method's name.

    A run that never understands counts as its last step. The rate is chosen on the seeds that are shown, for all
    methods alike.
    """
    best = []
    for name in methods():
        own = [row for row in rows if row["arm"].startswith(f"{name}, rate")]
        by_rate = {rate: [r for r in own if r["settings"]["lr"] == rate] for rate in {r["settings"]["lr"] for r in own}}
        chosen = min(by_rate.values(), key=lambda group: sum(steps_needed(row) for row in group) / len(group))
        best += [row | {"arm": name, "needed": steps_needed(row)} for row in chosen]
    return best


def steps_needed(row: dict) -> int:
    """Steps to 95 % on validation, or all of the run's where that was never reached."""
    return row["settings"]["steps"] if row["understood"] is None else row["understood"]


def conclusion(rows: list[dict]) -> str:
    """Whether the filter is faster than its controls, each at its own best rate, from :func:`best_rows`."""
    against = {name: difference(rows, name, FILTERED, "needed") for name in methods() if name != FILTERED}
    parts = [f"{name} {mean:+.0f} [{low:+.0f}, {high:+.0f}]" for name, (mean, low, high) in against.items()]
    plain, matched = against.values()
    found = verdict(
        plain,
        matched,
        (
            "the filter accelerates, and not only as a slower momentum",
            "the filter accelerates, but no more than a slower momentum is shown to",
            "the filter delays",
            "no acceleration by the filter is shown",
        ),
    )
    seeds = len({row["seed"] for row in rows})
    return f"Steps to understand minus the filter's, over {seeds} seeds: {'; '.join(parts)}: {found}."


def mean_curves(rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Validation accuracy of each method, and training accuracy of the plain one, as (step, mean over seeds)."""

    def mean(arm, key):
        own = [row for row in rows if row["arm"] == arm]
        return [(s, sum(values) / len(own)) for s, *values in zip(own[0]["steps"], *(r[key] for r in own), strict=True)]

    return {"AdamW, training half": mean("AdamW", "train"), **{name: mean(name, "validation") for name in methods()}}
