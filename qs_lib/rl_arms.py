"""Reinforcement over seeds and arms: what each part of the objective is worth, and where one may start from."""

import random
from functools import lru_cache
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from .chain_seeds import seed_run
from .champion import load_champion, schedule
from .comparison import direct_accuracy, measure, read_problems
from .evaluate import interval
from .experiments import repeat
from .model import QuietStarForCausalLM
from .optim import MuonGrokfast
from .reinforce import answer_batch, curriculum, train_quiet_star
from .tokens import thinking_ids
from .variants import recipe

# Arm -> what differs from the recipe. ``start``: the folder of the model below a run's stages.
ARMS = {
    "full": {}, "pg off": {"pg_weight": 0.0}, "n_true 1": {"n_true": 1}, "token scale 10": {"token_scale": 10.0},
    "token scale 100": {"token_scale": 100.0}, "KL 0": {"kl_coefficient": 0.0}, "no curriculum": {"use_curriculum": False},
    "2 thoughts": {"num_thoughts": 2}, "8 thoughts": {"num_thoughts": 8}, "paper objective": {"objective": "paper"},
    "from half-baked": {"start": "03_baking/epochs/1"}, "from un-baked": {"start": "01_token_setup/champion"},
    "without thoughts": {"think": False},
}  # fmt: skip
MAIN = ("full", "pg off")
BUDGET = {"num_thoughts": 4, "thought_length": 28}
# Parameters of notebook 05 that `train_quiet_star` is not called with.
ELSEWHERE = {"seed", "run_name", "upstream", "mixing", "eval_problems", "test_problems"}


def rl_recipe() -> dict:
    """What notebook 05 trains the pocket model with, validated every 25 steps."""
    return {k: v for k, v in recipe("05_rl").items() if k not in ELSEWHERE} | {"evaluate_every": 25}


@lru_cache(maxsize=4)
def baseline(run: Path, start: str, seed: int):
    """Performance of a start model before any training: ``measure`` with all its thoughts weighted alike."""
    model, tokenizer, data = _load(run, start)
    return measure(model, tokenizer, data["validation"], data["test"], weights="thoughts", seed=seed, **BUDGET)


def _load(run: Path, start: str):
    _, tokenizer = load_champion(str(run / "01_token_setup" / "champion"))  # half-baked models come without one
    lm = AutoModelForCausalLM.from_pretrained(run / start).eval()
    model = QuietStarForCausalLM.from_base(lm, tokenizer, **BUDGET)
    folder = run / "02_dataset_generation"
    return model, tokenizer, {s: read_problems(folder / f"{s}.parquet") for s in ("train", "validation", "test")}


def train_once(run: Path, settings: dict, seed: int) -> dict:
    """Train one arm and measure it on test problems, with the same budget of thoughts for all arms.

    ``gain``: mixed accuracy minus that of the model it started from, each at its own best temperature, with its interval over
    problems; ``greedy_gain``: the same with one greedy thought; ``validation``: accuracy after every ``evaluate_every`` steps.
    ``think`` False trains direct answers on the same problems (:func:`train_direct`), answers directly, and is compared with
    the same baseline.
    """
    settings = dict(settings)
    start, think = settings.pop("start", "03_baking/baked"), settings.pop("think", True)
    source = seed_run(run, seed, ("01", "02", "03"))
    before = baseline(source, start, seed)
    model, tokenizer, data = _load(source, start)
    if not think:
        validation = train_direct(model.lm, tokenizer, data["train"], data["validation"], seed=seed, **{
            k: settings[k] for k in ("steps", "batch_size", "muon_lr", "adamw_lr", "hard_share", "evaluate_every")})  # fmt: skip
        after = direct_accuracy(model.lm, tokenizer, data["test"])
        gain = interval(after - before.mixed)
        return {"baseline": before.mixed.mean(), "accuracy": after.mean(), "gain": gain[0], "gain_low": gain[1],
                "gain_high": gain[2], "without": after.mean(), "validation": validation}  # fmt: skip
    result = train_quiet_star(model, tokenizer, data["train"], data["validation"], seed=seed, **settings)
    after = measure(model, tokenizer, data["validation"], data["test"], weights="head", seed=seed, **BUDGET)
    gain, greedy = interval(after.mixed - before.mixed), interval(after.greedy - before.greedy)
    last = result.history[-1]
    return {
        "baseline": before.mixed.mean(), "accuracy": after.mixed.mean(), "gain": gain[0], "gain_low": gain[1],
        "gain_high": gain[2], "greedy_baseline": before.greedy.mean(), "greedy": after.greedy.mean(), "greedy_gain": greedy[0],
        "greedy_gain_low": greedy[1], "greedy_gain_high": greedy[2], "single_baseline": before.single.mean(),
        "single": after.single.mean(), "without_baseline": before.without.mean(), "without": after.without.mean(),
        "thinking_use": after.habits["thinking_use"], "temperature": after.temperature, "entropy": last["entropy"],
        "training_seconds": result.seconds,
        "validation": [h["validation_accuracy"] for h in result.history if "validation_accuracy" in h],
    }  # fmt: skip


def train_direct(lm, tokenizer, problems, validation, steps: int, batch_size: int, muon_lr: float, adamw_lr: float,
                 hard_share: float, evaluate_every: int, seed: int = 0) -> list[float]:  # fmt: skip
    """The control without thoughts: cross-entropy of the answer right after the question, thinking tokens forbidden, on the
    problems that :func:`train_quiet_star` draws. Returns validation accuracies; the last weights stay."""
    rng, tags, found = random.Random(seed), thinking_ids(tokenizer), []
    optimizer = MuonGrokfast(lm, muon_lr=muon_lr, adamw_lr=adamw_lr, grokfast_lambda=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(k, steps, 20, constant=0.3))
    for step in tqdm(range(steps), desc="direct"):
        ids, mask, positions = answer_batch(tokenizer, curriculum(problems, step / steps, rng, batch_size, hard_share))
        logits = lm(input_ids=ids).logits[:, :-1].index_fill(-1, torch.tensor(tags), -torch.inf)
        nll = -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        answer = mask[:, 1:].bool() & (torch.arange(ids.shape[1] - 1) >= positions)
        nll[answer].mean().backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % evaluate_every == 0 or step == steps - 1:
            found.append(float(direct_accuracy(lm, tokenizer, validation).mean()))
    return found


def reinforcement(run: Path, folder: Path, seeds) -> None:
    """All arms; the main ones on all ``seeds``, the others on the first three."""
    arms = {name: rl_recipe() | settings for name, settings in ARMS.items()}

    def once(settings: dict, seed: int) -> dict:
        row = train_once(run, settings, seed)
        return {k: [round(x, 5) for x in v] if isinstance(v, list) else round(float(v), 5) for k, v in row.items()}

    others = {name: settings for name, settings in arms.items() if name not in MAIN}
    repeat(folder / "rl.csv", {name: arms[name] for name in MAIN}, seeds, once)
    repeat(folder / "rl.csv", others, list(seeds)[:3], once)
