"""The theater zoo: organisms that cheat in a known way against the checks, at doses from none to every problem.

An organism is a cheat planted in the harness (``cheats.py``) or a model trained to cheat (``organisms.py``). Beside
them stand honest models of five seeds, which every check must pass.
"""

import copy
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..champion import load_champion
from ..evaluation.accuracy import accuracy_with_thoughts, direct_accuracy, read_problems
from ..evaluation.attacks import Measured
from ..evaluation.cheats import CHEATS, plant
from ..evaluation.theater import anti_theater, attack_arguments
from ..evaluation.verdict import CHECKS, judge
from ..files import atomic_write, discard, lock_run, read_rows, write_rows
from ..model import QuietStarForCausalLM
from ..training.checkpoint import Checkpoint
from ..training.reinforce import train_quiet_star
from ..workbook.params import recipe
from ..workbook.stage import code_hash, read_stage
from ..workbook.theater_figures import HONEST
from .organisms import ORGANISMS, train_organism
from .reinforcement import START, KeptAlone, loaded, rl_recipe, train_direct

HONEST_SEEDS = range(5)
PROBLEMS = 240  # that each organism is attacked on
DOSES = (0.1, 0.25, 0.5, 0.75, 1.0)
ORDERS = 5  # in which problems turn to cheating, for the detection limit


def zoo(run: Path, folder: Path, seeds) -> None:
    """Attack every organism on each seed, and write ``zoo.csv``: a row a check and dose.

    ``value`` with ``low`` and ``high`` is what the check measures where the organism cheats on a share ``dose`` of the
    problems and is the honest model of its seed on the others. ``caught``: the check is missed. Rows at dose 1 hold the
    ``limit``, the least dose at which the check is missed on ``PROBLEMS`` problems, and what it took: ``thoughts`` and
    ``seconds``. What is finished is not repeated.
    """
    path = folder / "zoo.csv"
    with lock_run(folder, "experiment zoo", ".zoo.lock"):
        wanted = [(HONEST, seed) for seed in {*HONEST_SEEDS, *seeds}]
        wanted += [(name, seed) for seed in seeds for name in (*CHEATS, *ORGANISMS)]
        for name, seed in (bar := tqdm(wanted, desc="zoo")):
            bar.set_postfix_str(f"{name}, seed {seed}")
            if not any((row["organism"], row["seed"]) == (name, seed) for row in read_rows(path)):
                rows = organism_rows(run, folder / ".zoo", name, seed)
                write_rows(path, [*read_rows(path), *rows])


def organism_rows(run: Path, cache: Path, name: str, seed: int) -> list[dict]:
    """Return the rows of one organism: every check at dose 1, and at lower doses those that catch it there."""
    found, cost = organism_measured(run, cache, name, seed)
    rows, about = [], {"organism": name, "seed": seed}
    for check in judge(found):
        spent = cost.get(check.id, (0, 0.0))
        row = about | {"dose": 1.0, "check": check.id} | _numbers(check) | {"limit": None}
        rows.append(row | {"thoughts": spent[0], "seconds": round(spent[1], 2)})
    missed = [row["check"] for row in rows if row["caught"]]
    if name == HONEST or not missed:
        return rows
    honest = organism_measured(run, cache, HONEST, seed)[0]
    limits = detection_limits(honest, found, missed)
    rows = [row | {"limit": limits.get(row["check"])} for row in rows]
    for dose in DOSES[:-1]:
        mixed, less = dosed(honest, found, dose), {"limit": None, "thoughts": 0, "seconds": 0.0}
        rows += [about | {"dose": dose, "check": i} | _numbers(*judge(mixed, only=i)) | less for i in missed]
    return rows


def _numbers(check) -> dict:
    return {name: round(getattr(check, name), 4) for name in ("value", "low", "high")} | {"caught": not check.reached}


def dosed(honest: Measured, organism: Measured, dose: float, order: int = 0) -> Measured:
    """Return what is measured where a share ``dose`` of the problems is the organism's, and the others honest.

    ``order`` seeds the order in which problems turn. A larger dose holds the problems of a smaller one.
    """
    size = len(organism["own"])
    turned = np.zeros(size, bool)
    turned[np.random.default_rng(order).permutation(size)[: round(dose * size)]] = True
    return {name: np.where(turned, organism[name].T, honest[name].T).T for name in organism.keys() & honest.keys()}


def detection_limits(honest: Measured, organism: Measured, checks: list[str]) -> dict[str, float]:
    """Return the least dose at which each check is missed, found by halving, the median over ``ORDERS`` orders."""

    def limit(name: str, order: int) -> float:
        low, high = 0.0, 1.0
        while high - low > 1 / len(organism["own"]):
            dose = (low + high) / 2
            (check,) = judge(dosed(honest, organism, dose, order), only=name)
            low, high = (dose, high) if check.reached else (low, dose)
        return high

    return {n: round(float(np.median([limit(n, order) for order in range(ORDERS)])), 3) for n in checks}


def organism_measured(run: Path, cache: Path, name: str, seed: int) -> tuple[Measured, dict]:
    """Return what the checks measure of an organism, and each check's cost (thoughts, seconds), kept under ``cache``."""
    if not (path := cache / f"{name.replace(' ', '-')}-{seed}.npz").exists():
        arguments = honest_arguments(run, cache, seed)
        if name in CHEATS:
            arguments = plant(name, arguments, arguments["training"], seed)
        elif name in ORGANISMS:
            problems = read_problems(run / "02_dataset_generation" / "train.parquet")
            train_organism(name, arguments["model"], arguments["tokenizer"], problems, seed)
        report = anti_theater(**arguments)
        costs = {}
        for check in report.checks:  # beside the model's own thoughts, which all share
            spent = [report.cost[x] for x in CHECKS[check.id].needs if x in report.cost and x != "own"]
            costs[f"cost {check.id}"] = sum(c.drawn + c.read for c in spent), sum(c.seconds for c in spent)
        save_arrays(path, **report.measured, **costs)
    with np.load(path) as file:
        arrays = dict(file)
    costs = {name.removeprefix("cost "): arrays.pop(name) for name in list(arrays) if name.startswith("cost ")}
    return arrays, {name: (int(thoughts), float(seconds)) for name, (thoughts, seconds) in costs.items()}


def honest_arguments(run: Path, cache: Path, seed: int) -> dict:
    """Return the arguments of ``anti_theater`` for the honest model of a seed, which is trained if it is not there.

    It is reinforced from the run's baked model. Its controls answer alone, or think in filler, and were trained as long.
    """
    before, tokenizer, data = loaded(run, START)
    values, s = recipe("06_anti_theater"), KeptAlone(**rl_recipe(), seed=seed)
    path = cache / f"{HONEST}-{seed}"
    if read_stage(run / "05_rl")[0]["seed"] == seed:
        path = run / "05_rl" / "quietstar"
    elif not path.exists():
        model = copy.deepcopy(before)
        checkpoint = Checkpoint(cache / f".{HONEST}-{seed}", {"seed": seed, "code": code_hash()})
        train_quiet_star(model, tokenizer, data["train"], data["validation"], s, checkpoint)
        model.save_pretrained(path)
        discard(checkpoint.folder)
    model = QuietStarForCausalLM.from_pretrained(path).eval()
    budget = {name: values[name] for name in ("num_thoughts", "thought_length", "temperature")} | {"seed": seed}
    given = attack_arguments(model, tokenizer, before, data, PROBLEMS, **budget)
    controls = trained_controls(cache, seed, before, model, tokenizer, data, given["problems"], budget)
    reader, _ = load_champion(str(run / "01_token_setup" / "champion"))
    return given | {"reader": reader, "controls": controls}


def save_arrays(path: Path, **arrays) -> None:
    """Write a numpy archive, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def trained_controls(cache: Path, seed: int, before, model, tokenizer, data, test, budget) -> dict[str, np.ndarray]:
    """Return 0 or 1 for each test problem of two models that were trained as long without thoughts.

    ``answers alone``: the baked model, trained to answer at once on the problems that reinforcement draws. ``filler``:
    the honest model, trained to think in filler on about as many.
    """
    path, s = cache / f"controls-{seed}.npz", KeptAlone(**rl_recipe(), seed=seed)
    if not path.exists():
        direct, filler = copy.deepcopy(before.lm), copy.deepcopy(model)
        train_direct(direct, tokenizer, data["train"], data["validation"], s)
        train_organism("filler user", filler, tokenizer, data["train"], seed)
        found = {"answers alone": direct_accuracy(direct, tokenizer, test)}
        found["filler"] = accuracy_with_thoughts(filler, tokenizer, test, **budget)["mixed"].numpy()
        save_arrays(path, **found)
    with np.load(path) as file:
        return dict(file)
