"""The pocket baking over seeds, and its optimizer against controls with the same data and weight decay."""

import functools
from pathlib import Path

import pandas as pd
import torch

from ..champion import load_champion
from ..data.problems import limit_hard, load_problems
from ..data.strategies import reasoning_dataset
from ..evaluation.accuracy import direct_accuracy, read_problems, reply_statistics
from ..stats import column, difference, fixed, seed_interval, shown
from ..training.baking import bake
from ..training.checkpoint import Checkpoint
from ..training.optim import MuonGrokfast
from ..training.settings import BakingSettings
from ..workbook.params import recipe
from ..workbook.stage import read_stage, stage_digest
from .arms import repeat, verdict
from .grokking import matched_momentum

# What the baked model must reach on test problems, as a mean over seeds.
TARGETS = {"accuracy": 0.85, "thinking_use": 0.95, "strategy_fit": 0.9, "gap_closed": 0.8, "direct_change": -0.05}
BAKED_WITH = BakingSettings().model_dump(exclude={"seed"})
OPTIMIZER_RATES = ("muon_lr", "adamw_lr", "grokfast_lambda")  # what an optimizer of one's own replaces
LAMBDA, ALPHA, MOMENTUM, BETAS = 0.2, 0.98, 0.95, (0.9, 0.95)
SUBJECT = "Muon x Grokfast"
# The lowest rate of each scan, which goes on in steps of 2 around the recipe's; AdamW's share of Muon's rate is fixed.
LOWEST = {"AdamW": 1e-3, "Muon": 3e-3, "Muon, matched momentum": 3e-3, SUBJECT: 3e-3}
ADAMW_SHARE = 1 / 6
ALL_SHOWN = {"hard_shown": 1.0, "hard_examples": 1.0}
# The optimizers' grid is long: fewer examples and trajectories, alike for all.
SMALLER = {"examples": 900, "trajectories": 900}


def make_optimizer(name: str, rate: float):
    """Return a function model -> optimizer, without weight decay. AdamW's rate beside Muon is a sixth of ``rate``.

    Matched momentum lags behind the gradient as far as the filter does, in Muon and in AdamW.
    """
    if name == "AdamW":
        return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=0.0, fused=True)
    slower = name == "Muon, matched momentum"
    momentum, beta = (matched_momentum(b, LAMBDA, ALPHA) if slower else b for b in (MOMENTUM, BETAS[0]))
    strength = LAMBDA if name == SUBJECT else 0.0
    rates = {"muon_lr": rate, "adamw_lr": rate * ADAMW_SHARE, "grokfast_lambda": strength, "grokfast_alpha": ALPHA}
    return lambda model: MuonGrokfast(model, **rates, momentum=momentum, betas=(beta, BETAS[1]))


def baking_recipe() -> dict:
    """Return what notebook 03 bakes the pocket model with: its data, and :class:`BakingSettings` but for the seed."""
    values = recipe("03_baking")
    return {name: values[name] for name in ("examples", "hard_shown", *BAKED_WITH)}


def bake_once(run: Path, settings: dict, seed: int, checkpoint: Checkpoint | None = None, tested: bool = True) -> dict:
    """Bake the run's champion as ``settings`` say and measure it on its test (or only on validation) problems.

    ``seed`` draws the training problems, the worked examples, the teacher's samples and the order of the batches. The
    champion and the held-out problems are the run's own. ``settings``: those of :func:`baking_recipe`, or ``optimizer``
    and ``rate`` (:func:`make_optimizer`) in place of its rates. ``hard_examples`` replaces the run's share of hard
    problems among worked examples. Shares are exact matches of greedy replies; ``direct_*`` with thinking tokens
    forbidden, before and after.
    """
    folder = run / "02_dataset_generation"
    record = read_stage(folder)[0]
    made = record["parameters"]
    held = {name: read_problems(folder / f"{name}.parquet") for name in ("validation", "test")}
    problems = list(load_problems(made["data"] or made["source"], "train", made["train_problems"], seed))
    pool = limit_hard(problems, settings.get("hard_examples", made["hard_examples"]), seed=seed)
    sizes = (made["cot_examples"], made["strategy_examples"])
    worked = list(reasoning_dataset(pool, held["validation"] + held["test"], *sizes, seed)["train"])
    used = {e["question"] for e in worked}
    unseen = limit_hard([p for p in problems if p["question"] not in used], settings["hard_shown"], seed=seed)
    model, tokenizer = load_champion(str(run / "01_token_setup" / "champion"))
    before = direct_accuracy(model, tokenizer, held["test"]) if tested else None
    given = {name: settings[name] for name in BAKED_WITH if name in settings}
    if "optimizer" in settings:
        given["optimizer"] = make_optimizer(settings["optimizer"], settings["rate"])
    given |= {"seed": seed, "checkpoint": checkpoint}
    result = bake(model, tokenizer, worked[: settings["examples"]], unseen, held["validation"], **given)
    last = result.epochs[-1]
    row = {"validation_accuracy": last["accuracy"], "gap_closed": result.gap_closed}
    row |= {name: last[name] for name in last if name == "max_logit"}  # not every family's can be seen
    if tested:
        after = direct_accuracy(model, tokenizer, held["test"])
        row |= reply_statistics(model, tokenizer, held["test"], settings["max_new_tokens"])
        row |= {"direct_before": before.mean(), "direct_after": after.mean(), "direct_change": (after - before).mean()}
    return row | {"data": stage_digest(record)[:12]}


def baking(run: Path, folder: Path, seeds) -> None:
    """Bake with the recipe of notebook 03, which shows few hard problems, and the same with all of them shown."""
    arms = {"recipe": baking_recipe(), "all hard problems shown": baking_recipe() | ALL_SHOWN}
    repeat(folder / "baking.csv", arms, seeds, functools.partial(bake_once, run), BAKED_WITH)


def optimizers(run: Path, folder: Path, seeds) -> None:
    """Scan the learning rate of each optimizer (seed 0, validation problems), then test each at its best rate on other
    seeds, so that no run is measured that was chosen."""
    alike = {name: value for name, value in (baking_recipe() | SMALLER).items() if name not in OPTIMIZER_RATES}
    rates = {name: [lowest * 2**k for k in range(4)] for name, lowest in LOWEST.items()}
    beyond, measure = rates, functools.partial(bake_once, run, tested=False)
    while any(beyond.values()):
        tried = [(name, rate) for name in rates for rate in rates[name]]
        arms = {f"{name}, rate {rate:g}": alike | {"optimizer": name, "rate": rate} for name, rate in tried}
        best = best_rates(repeat(folder / "optimizers_scan.csv", arms, [0], measure, BAKED_WITH))
        beyond = {name: edge(rates[name], best[name]) for name in rates}
        rates = {name: rates[name] + ([beyond[name]] if beyond[name] else []) for name in rates}
    arms = {name: alike | {"optimizer": name, "rate": rate} for name, rate in best.items()}
    repeat(folder / "optimizers.csv", arms, [s + 1 for s in seeds], functools.partial(bake_once, run), BAKED_WITH)


def best_rates(scan: list[dict]) -> dict[str, float]:
    """Return the rate of each optimizer with the best validation accuracy in the scan, the smaller one of equals."""
    points = scan_lines(scan)
    return {name: max(points[name], key=lambda point: point[1])[0] for name in points if points[name]}


def edge(rates: list[float], best: float) -> float | None:
    """Return the next rate to try when the best one lies at an end of the scan, which is widened at most twice."""
    beyond = {min(rates): best / 2} | {max(rates): best * 2} if len(rates) < 6 else {}
    return beyond.get(best)


def optimizer_conclusion(rows: list[dict], key: str = "accuracy") -> str:
    """Say what the optimizers' rows show about Grokfast, control by control, in one sentence that may say no."""
    against = {name: [100 * x for x in difference(rows, SUBJECT, name, key)] for name in LOWEST if name != SUBJECT}
    slower = "the filter helps, but no more than a slower momentum is shown to"
    verdicts = ("Grokfast helps", slower, "Grokfast hurts", "no gain from Grokfast is shown")
    seeds, found = len(column(rows, SUBJECT, "seed")), verdict(against, 1, verdicts)
    return f"{SUBJECT} minus its controls, points of {key} over {seeds} seeds: {found}."


def seeds_table(rows: list[dict]) -> pd.DataFrame:
    """Return mean and interval over seeds of each number with a target, by arm, and whether the mean reaches it."""
    table = {"target": {key: f">= {target}" for key, target in TARGETS.items()}}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        values = {key: seed_interval(column(rows, arm, key)) for key in TARGETS}
        table[arm] = {key: shown(v, key == "direct_change") for key, v in values.items()}
        table[f"{arm}: reached"] = {key: "yes" if v[0] >= TARGETS[key] else "no" for key, v in values.items()}
    return pd.DataFrame(table)


def optimizer_table(rows: list[dict]) -> pd.DataFrame:
    """Return each optimizer at its own best rate: mean and interval over seeds on test problems."""
    table, keys = {}, ("accuracy", "gap_closed", "direct_change")
    for name in LOWEST:
        table[name] = {key: shown(seed_interval(column(rows, name, key)), key == "direct_change") for key in keys}
        rate, seconds = column(rows, name, "settings")[0]["rate"], column(rows, name, "seconds")
        table[name] |= {"rate": f"{rate:g}", "seconds": fixed(sum(seconds) / len(seconds), 0)}
    return pd.DataFrame(table).T


def scan_lines(scan: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return optimizer -> (rate, validation accuracy) points of its scan, by rate."""
    points = {name: [] for name in LOWEST}
    for row in sorted(scan, key=lambda row: row["settings"]["rate"]):
        points[row["settings"]["optimizer"]].append((row["settings"]["rate"], row["validation_accuracy"]))
    return points
