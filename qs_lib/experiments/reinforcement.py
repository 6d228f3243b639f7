"""Reinforcement over seeds and arms: what each part of the objective is worth, and where one may start from."""

import copy
import random
from functools import lru_cache
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from ..champion import load_champion
from ..data.batches import answer_batch, curriculum
from ..data.problems import baking_data
from ..data.tokens import thinking_ids
from ..evaluation.accuracy import direct_accuracy, measure, read_problems
from ..evaluation.likelihood import SHARPENINGS, answer_probability, fitted
from ..model import QuietStarForCausalLM
from ..stats import interval, named
from ..training.baking import bake
from ..training.checkpoint import Checkpoint
from ..training.loop import scheduled, update
from ..training.optim import MuonGrokfast
from ..training.reinforce import train_quiet_star
from ..training.settings import BakingSettings, QuietStarSettings
from ..workbook.params import recipe
from ..workbook.stage import read_stage, stage_digest
from .arms import repeat
from .chain import seed_run
from .findings import for_scoreboard

START, EIGHTH = "03_baking/baked", "an eighth of the baking"
# Arm -> what differs from the recipe. ``start``: the folder of the model in the run, or EIGHTH (eighth_baked).
ARMS = {
    "full": {},
    "pg off": {"pg_weight": 0.0},
    "n_true 1": {"n_true": 1},
    "token scale 10": {"token_scale": 10.0},
    "token scale 100": {"token_scale": 100.0},
    "KL 0": {"kl_coefficient": 0.0},
    "no curriculum": {"use_curriculum": False},
    "2 thoughts": {"num_thoughts": 2},
    "8 thoughts": {"num_thoughts": 8},
    "paper objective": {"objective": "paper"},
    "from half-baked": {"start": "03_baking/epochs/1"},
    "from eighth-baked": {"start": EIGHTH},
    "from un-baked": {"start": "01_token_setup/champion"},
    "without thoughts": {"think": False},
}
# Arm -> the seeds that decide what it is asked. The others run on all seeds that are asked for.
DECIDED_BY = dict.fromkeys(("n_true 1", "token scale 10", "KL 0", "8 thoughts", "paper objective"), range(3))
DECIDED_BY |= dict.fromkeys(("from half-baked", "from un-baked", "without thoughts"), range(3))
DECIDED_BY |= {"pg off": range(6), "token scale 100": range(6), "no curriculum": range(7)}
DECIDED_BY |= {"from eighth-baked": (0, 3, 4, 5)}  # the champions of 1 and 2 were gone when this arm was added
# Where numbers are spelt in digits, the token after a thought is only the first of the answer's.
LOOK_AHEAD = {"n_true 4": {}, "n_true 1": {"n_true": 1}}
THOUGHTS = 4
STAGES = ("01", "02", "03")
TRAINED_WITH = QuietStarSettings().model_dump(exclude={"seed"})


class KeptAlone(QuietStarSettings):
    """The mixing head learns from the kept problems alone, slopes uncut, as it did when all committed rows were made."""

    head_sees_all = False


def rl_recipe(variant: str = "pocket") -> dict:
    """Return the :class:`QuietStarSettings` of notebook 05 for a variant, validated every 25 steps."""
    values = recipe("05_rl", variant)
    return {name: values[name] for name in TRAINED_WITH} | {"evaluate_every": 25}


@lru_cache(maxsize=4)
def baseline(run: Path, start: str, length: int, seed: int):
    """Return what a start model does before any training, with all its thoughts weighted alike: :func:`measured`."""
    return measured(*loaded(run, start), "thoughts", length, seed)


def measured(model, tokenizer, data, weights: str, length: int, seed: int):
    """Return (:class:`Performance`, name -> array): results on test problems, and probabilities of their true answers.

    Of the probabilities ``with`` and ``without`` thoughts, ``with fitted`` and ``without fitted`` are at the sharpening
    of the predictions that is best on validation problems.
    """
    budget = {"weights": weights, "seed": seed, "num_thoughts": THOUGHTS, "thought_length": length}
    found = measure(model, tokenizer, data["validation"], data["test"], max_new_tokens=length + 20, **budget)
    budget["temperature"], plain = found.temperature, SHARPENINGS.index(1.0)
    validation, test = (answer_probability(model, tokenizer, data[s], **budget) for s in ("validation", "test"))
    likely = {name: test[name][plain] for name in test}
    return found, likely | {f"{name} fitted": test[name][fitted(validation[name])] for name in test}


def loaded(run: Path, start: str):
    """Return a start model of a run without trained thoughts, its tokenizer, and problems and examples by split."""
    _, tokenizer = load_champion(str(run / "01_token_setup" / "champion"))  # half-baked models come without one
    eighth = start == EIGHTH
    lm = copy.deepcopy(eighth_baked(run)) if eighth else AutoModelForCausalLM.from_pretrained(run / start).eval()
    model = QuietStarForCausalLM.from_base(lm, tokenizer, num_thoughts=THOUGHTS)
    folder = run / "02_dataset_generation"
    splits = ("train", "validation", "test", "examples")
    return model, tokenizer, {s: read_problems(folder / f"{s}.parquet") for s in splits}


@lru_cache(maxsize=1)
def eighth_baked(run: Path):
    """Return the champion after an eighth of its baking: half of its replies think, and most thoughts are wrong."""
    values, seed = recipe("03_baking"), read_stage(run / "03_baking")[0]["seed"]
    lm, tokenizer = load_champion(str(run / "01_token_setup" / "champion"))
    folder = run / "02_dataset_generation"
    examples, train, validation = (read_problems(folder / f"{s}.parquet") for s in ("examples", "train", "validation"))
    worked, unseen = baking_data(examples, train, values["examples"] // 4, values["hard_shown"], seed)
    fewer = BakingSettings.among(values, epochs=1, trajectories=values["trajectories"] // 4, seed=seed)
    bake(lm, tokenizer, worked, unseen, validation[:48], fewer)
    return lm


def train_once(run: Path, settings: dict, seed: int, checkpoint: Checkpoint | None = None) -> dict:
    """Train one arm from a model of ``run`` and measure it on test problems, with one budget of thoughts for all arms.

    ``gain``: mixed accuracy minus that of the model it started from, each at its own best temperature, with its
    interval over problems. ``greedy_gain``: the same with one greedy thought. ``probability``: the paper's metric;
    ``_fitted`` is the start model's with one fitted temperature on its predictions, and ``beyond_temperature`` the
    trained model's minus that. ``validation``: accuracy after every ``evaluate_every`` steps. ``think`` False trains
    direct answers on the same problems (:func:`train_direct`), and is compared with the same baseline.
    """
    start, think = settings.get("start", START), settings.get("think", True)
    s = KeptAlone(**{k: v for k, v in settings.items() if k not in ("start", "think")}, seed=seed)
    before, likely = baseline(run, start, s.thought_length, seed)
    model, tokenizer, data = loaded(run, start)
    if not think:
        validation = train_direct(model.lm, tokenizer, data["train"], data["validation"], s)
        after = direct_accuracy(model.lm, tokenizer, data["test"])
        row = {"baseline": before.mixed.mean(), "accuracy": after.mean(), "without": after.mean()}
        return row | {"validation": validation, **named("gain", interval(after - before.mixed))}
    result = train_quiet_star(model, tokenizer, data["train"], data["validation"], s, checkpoint)
    after, likelier = measured(model, tokenizer, data, "head", s.thought_length, seed)
    row = {"baseline": before.mixed.mean(), "accuracy": after.mixed.mean()}
    row |= named("gain", interval(after.mixed - before.mixed))
    for name in ("greedy", "single", "without"):
        row |= {f"{name}_baseline": getattr(before, name).mean(), name: getattr(after, name).mean()}
    row |= named("greedy_gain", interval(after.greedy - before.greedy))
    row |= {"probability_baseline": likely["with"].mean(), "probability": likelier["with"].mean()}
    for name in ("with fitted", "without", "without fitted"):
        row[f"probability_{name.removeprefix('with ').replace(' ', '_')}"] = likely[name].mean()
    row |= named("beyond_temperature", interval(likelier["with"] - likely["with fitted"]))
    row |= {"thinking_use": after.statistics["thinking_use"], "entropy": result.history[-1]["entropy"]}
    row |= {"temperature_baseline": before.temperature, "temperature": after.temperature}
    row |= {"training_seconds": result.seconds}
    return row | {"validation": [h["validation_accuracy"] for h in result.history if "validation_accuracy" in h]}


def train_direct(lm, tokenizer, problems, validation, s: QuietStarSettings) -> list[float]:
    """Train the control without thoughts and return its validation accuracies. The last weights stay.

    It learns answers right after questions by cross-entropy, tags forbidden, on what :func:`train_quiet_star` draws.
    """
    rng, tags, found = random.Random(s.seed), thinking_ids(tokenizer), []
    optimizer = MuonGrokfast(lm, muon_lr=s.muon_lr, adamw_lr=s.adamw_lr, grokfast_lambda=0.0)
    scheduler = scheduled(optimizer, s.steps, warm_up=20, constant=0.3)
    for step in tqdm(range(s.steps), desc="direct"):
        chosen = curriculum(problems, step / s.steps, rng, s.batch_size, s.hardest_share)
        ids, mask, positions = answer_batch(tokenizer, chosen, lm.device)
        logits = lm(input_ids=ids).logits[:, :-1].index_fill(-1, ids.new_tensor(tags), -torch.inf)
        nll = -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        answer = mask[:, 1:].bool() & (torch.arange(ids.shape[1] - 1, device=ids.device) >= positions)
        update(nll[answer].mean(), optimizer, scheduler, {"model": lm.parameters()}, "the loss of direct answers")
        if (step + 1) % s.evaluate_every == 0 or step == s.steps - 1:
            found.append(float(direct_accuracy(lm, tokenizer, validation).mean()))
    return found


def reinforcement(run: Path, folder: Path, seeds) -> None:
    """Make all arms on all ``seeds`` but those that fewer of them decide."""
    once = lambda settings, seed, checkpoint: trained_row(seed_run(run, seed, STAGES), settings, seed, checkpoint)
    arms = {name: rl_recipe() | settings for name, settings in ARMS.items()}
    for seed in seeds:
        asked = {name: arms[name] for name in arms if seed in DECIDED_BY.get(name, seeds)}
        repeat(folder / "rl.csv", asked, [seed], once, TRAINED_WITH)
    for_scoreboard(folder)


def look_ahead(run: Path, folder: Path, seeds) -> None:
    """Compare rewards over four true tokens and over one, from one model that spells numbers in digits."""
    digits = run.with_name(f"{run.name}-digits")
    once = lambda *given: trained_row(seed_run(digits, 0, STAGES, "pocket-digits"), *given)
    arms = {name: rl_recipe("pocket-digits") | changed for name, changed in LOOK_AHEAD.items()}
    repeat(folder / "look_ahead.csv", arms, seeds, once, TRAINED_WITH)
    for_scoreboard(folder)


def trained_row(run: Path, *given) -> dict:
    """Return :func:`train_once` with ``data``: the seed's baked model, another on each processor."""
    return train_once(run, *given) | {"data": stage_digest(read_stage(run / "03_baking")[0])[:12]}
