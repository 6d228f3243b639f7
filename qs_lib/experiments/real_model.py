"""A pretrained model on word problems: thoughts against equal training without them, arms x seeds.

Everything starts from the recipe of a variant (``params/*/<variant>.yaml``). No model is known here by name.
"""

import copy
import math
import random
import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from ..champion import load_champion
from ..data import tokens
from ..data.problems import baking_data, load_problems
from ..data.strategies import prompts_with, reasoning_dataset, reply
from ..errors import StageError
from ..evaluation import edits
from ..evaluation.accuracy import Performance, accuracy_with_thoughts, direct_accuracy, longest_answer, measure
from ..evaluation.episodes import answers_with
from ..evaluation.theater import anti_theater, attack_arguments
from ..files import discard, read_rows, save_whole, to_json, write_bytes, write_rows
from ..model import QuietStarForCausalLM
from ..stats import named
from ..training.baking import bake
from ..training.difference import save_difference
from ..training.imitation import imitate, learn_prompts
from ..training.reinforce import SEEN, train_quiet_star
from ..training.settings import BakingSettings, QuietStarSettings
from ..workbook.params import recipe
from ..workbook.tables import reply_rows
from .arms import repeat
from .findings import paired, write_criterion

_WORD = re.compile(r"[a-z]+")
SAMPLES = 8  # thoughts a problem for pass@k
CONTROL_RATES = (1e-4, 3e-4, 1e-3)  # of the controls
# Arm -> what differs from the recipes of 03 and 05. ``train``: what is trained.
BAKED = {"train": "baking"}
TRAINED_ARMS = {
    "raw": {"train": "nothing"},
    "answers alone": {"train": "answers"},
    "filler": {"train": "filler"},
    "baked": BAKED,
    "plain teacher": BAKED | {"privilege": "none"},
    "foreign teacher": BAKED | {"privilege": "foreign"},
    "worked examples alone": BAKED | {"trajectories": 0},
}
REINFORCED = {
    "reinforced": {},
    "with likelihood": {"nll_weight": 0.5},
    "pg off": {"pg_weight": 0.0, "nll_weight": 0.5},
    "probability": {"reward": "probability"},
    "likelihood": {"reward": "likelihood"},
    "Muon": {"muon": True, "muon_lr": 2e-3},
    "Muon x Grokfast, baking's": {"muon": True, "muon_lr": 1e-4, "adamw_lr": 1e-4, "grokfast_lambda": 0.2}
    | {"qk_clip_threshold": 30.0, "kl_coefficient": 0.0},
    "Muon x Grokfast, RL's": {"muon": True, "muon_lr": 5e-4, "adamw_lr": 5e-4, "grokfast_lambda": 0.1}
    | {"qk_clip_threshold": 25.0, "kl_coefficient": 0.1},
}
TRAINED_ARMS |= {name: {"train": "thoughts"} | changed for name, changed in REINFORCED.items()}
TRAINED_ARMS["expert iteration"] = {"train": "rounds"}


def material(variant: str, data: str = "", seed: int = 0) -> dict[str, list[dict]]:
    """Return the problems of the variant's three splits and its worked ``examples``, drawn by ``seed``."""
    values = recipe("02_dataset_generation", variant)
    source, sizes = data or values["data"] or values["source"], ("train", "validation", "test")
    found = {name: list(load_problems(source, name, values[f"{name}_problems"], seed)) for name in sizes}
    counts = values["cot_examples"], values["strategy_examples"]
    held_out = found["validation"] + found["test"]
    return found | {"examples": list(reasoning_dataset(found["train"], held_out, *counts, seed)["train"])}


def champion(variant: str, run: Path | None = None):
    """Return the variant's (model, tokenizer) with the eight thinking tokens: the one it names, or ``run``'s own."""
    values = recipe("01_token_setup", variant)
    source = values["champion"] or str(run / "01_token_setup" / "champion")
    return tokens.add_thinking_tokens(*load_champion(source, chat_template=values["chat_template"]))


def baked_with(variant: str, changed: dict, seed: int) -> tuple[BakingSettings, dict]:
    """Return the settings of a baking arm, and what its recipe says beside them."""
    values = recipe("03_baking", variant)
    return BakingSettings.among(values, **changed | {"seed": seed}), values


def trained_with(variant: str, changed: dict, seed: int) -> QuietStarSettings:
    """Return the settings of a reinforcement arm."""
    return QuietStarSettings.among(recipe("05_rl", variant), **changed | {"seed": seed})


def lessons_of(material, values: dict, s: BakingSettings) -> tuple[list[dict], list[dict]]:
    """Return the worked examples and the problems without one that a baking learns from."""
    parts, counts = (material["examples"], material["train"]), (values["examples"], values["hard_shown"])
    worked, unseen = baking_data(*parts, *counts, s.seed)
    return worked, unseen[: s.trajectories]


def bake_arm(variant, material, changed, seed, checkpoint):
    """Bake one arm and return (language model, tokenizer, numbers of the baking)."""
    (s, values), (model, tokenizer) = baked_with(variant, changed, seed), champion(variant)
    prompts = prompts_with(material["train"], values["prompt_examples"], s.privilege != "none")
    validation = material["validation"][: values["eval_problems"]]
    worked, unseen = lessons_of(material, values, s)
    learn_prompts(model, tokenizer, worked, s, prompts)
    result = bake(model, tokenizer, worked, unseen, validation, s, prompts, checkpoint=checkpoint)
    row = {"gap_closed": result.gap_closed, "kl_before": result.kl_before, "kl_after": result.kl_after}
    row["validation"] = [round(epoch["accuracy"], 4) for epoch in result.epochs]
    return model, tokenizer, row | {name: result.epochs[-1][name] for name in ("thinking_use", "strategy_fit")}


def filler(tokenizer, length: int) -> list[int]:
    """Return a thought of ``length`` tokens, tags counted, that says nothing."""
    start, end, step, *_ = tokens.thinking_ids(tokenizer)
    return [start, *[step] * (length - 2), end]


def control_arm(variant, material, kind, rates, seed):
    """Train a control on the problems that baking sees, as many epochs as training thoughts takes in all.

    It answers at once (``answers``), or after a filler as long as the worked thoughts are on average (``filler``). Its
    learning rate and its epoch are chosen on validation problems. Return its row.
    """
    s, values = baked_with(variant, {}, seed)
    worked, unseen = lessons_of(material, values, s)
    rl = trained_with(variant, {}, seed)
    s = s.but(epochs=s.epochs + s.prompt_epochs + -(-rl.steps * rl.batch_size // (len(worked) + len(unseen))))
    untrained, tokenizer = champion(variant)
    thought = filler(tokenizer, mean_length(tokenizer, worked)) if kind == "filler" else []
    plain = [tokens.encode(tokenizer, p["question"], reply(None, p)) for p in [*worked, *unseen]]
    texts = [(t.ids[: t.start], thought + t.ids[t.start :]) for t in plain]
    found, best = {}, None
    for rate in rates:
        lm = copy.deepcopy(untrained)
        right = partial(_answers_after, QuietStarForCausalLM.from_base(lm, tokenizer), tokenizer, thought)
        score = lambda right=right: right(material["validation"]).mean()
        scores = imitate(lm, tokenizer, texts, s.but(adamw_lr=rate), score)
        found[rate] = max(scores)
        if best is None or max(scores) > best[0]:
            best = max(scores), rate, right(material["test"]), elsewhere(material, right)
    row = best[3] | {"validation": best[0], "rate": best[1], "epochs": s.epochs, "accuracy": best[2].mean()}
    return row | {f"at {rate:g}": score for rate, score in found.items()} | {"right": outcomes(best[2])}


def mean_length(tokenizer, examples: list[dict]) -> int:
    """Return the tokens of a worked example's thought, both tags counted, a mean over ``examples``."""
    plain = [tokens.encode_reply(tokenizer, e["reply"].split(" done ")[0] + " done") for e in examples]
    return round(sum(len(tokens.mark(ids, tokens.marker_spellings(tokenizer))[0]) for ids in plain) / len(plain))


def _answers_after(model, tokenizer, thought: list[int], problems) -> np.ndarray:
    """Return whether greedy answers right after ``thought``, written behind the question, are right (0 or 1)."""
    if not thought:
        return direct_accuracy(model.lm, tokenizer, problems)
    rows = torch.tensor([[thought]] * len(problems), device=model.device)
    contexts = [tokens.encode_context(tokenizer, p["question"]) for p in problems]
    lengths, room = torch.full_like(rows[..., 0], len(thought)), longest_answer(tokenizer, problems)
    written = answers_with(model, tokenizer, contexts, rows, lengths, "thoughts", room)
    return np.array([w == p["answer"] for w, p in zip(written, problems, strict=True)], float)


def pass_at(right: np.ndarray, k: int) -> float:
    """Return pass@k from right (problems, n), 0 or 1: 1 - C(n - c, k) / C(n, k), the unbiased estimate of 2107.03374."""
    n = right.shape[1]
    return float(np.mean([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right.sum(1)]))


def thinking_row(model, tokenizer, material, weights: str, length: int, seed: int) -> tuple[dict, Performance]:
    """Return a model's numbers on test problems, each problem's outcome in a string of 0 and 1."""
    budget = {"num_thoughts": 4, "thought_length": length, "seed": seed}
    found = measure(model, tokenizer, material["validation"], material["test"], weights, **budget)
    many = budget | {"num_thoughts": SAMPLES, "max_new_tokens": longest_answer(tokenizer, material["test"])}
    drawn = accuracy_with_thoughts(model, tokenizer, material["test"], "thoughts", True, **many)
    right = drawn["each"].numpy()
    last = [[(t.split() or [""])[-1] for t in texts] for texts in drawn["thoughts"]]
    says = np.array([[x == p["answer"] for x in row] for row, p in zip(last, material["test"], strict=True)])
    row = {"accuracy": found.mixed.mean(), "greedy": found.greedy.mean(), "single": found.single.mean()}
    row |= {"without": found.without.mean(), "temperature": found.temperature, "follows": (says == right).mean()}
    row |= {f"pass@{k}": pass_at(right, k) for k in (1, 2, 4, 8)} | {"thinking_use": found.statistics["thinking_use"]}
    pairs = zip(found.thoughts, material["test"], strict=True)
    faults = [edits.fault(edits.words_of(text), p["steps"]) for texts, p in pairs for text in texts]
    row |= {f"fault_{name}": faults.count(name) / len(faults) for name in edits.FAULTS}

    def one_thought(problems, most=length) -> np.ndarray:
        room = longest_answer(tokenizer, problems)  # GSM8K's answers are longer than those of the test problems
        own = budget | {"num_thoughts": 1, "thought_length": most, "temperature": 0.0, "weights": "thoughts"}
        return accuracy_with_thoughts(model, tokenizer, problems, max_new_tokens=room, **own)["mixed"].numpy()

    row |= {f"greedy_{most}": one_thought(material["test"], most).mean() for most in (8, 16, 24)}  # cut that short
    row |= elsewhere(material, one_thought)
    row |= {"strategy_fit": found.statistics["strategy_fit"], "own_accuracy": found.statistics["accuracy"]}
    return row | {"right": outcomes(found.mixed), "right_greedy": outcomes(found.greedy)}, found


def raw_row(variant: str, material) -> dict:
    """Return what the champion does untrained: prompted with worked examples, and asked for the answer alone."""
    lm, tokenizer = champion(variant)
    values = recipe("03_baking", variant)
    prompts, tags = prompts_with(material["train"], values["prompt_examples"]), tuple(tokens.thinking_ids(tokenizer))
    rows = reply_rows(lm, tokenizer, material["test"], values["max_new_tokens"], prompts, tags)
    right = np.array([row["correct"] for row in rows], float)
    direct = lambda problems: direct_accuracy(lm, tokenizer, problems)
    row = {"accuracy": right.mean(), "right": outcomes(right), "without": direct(material["test"]).mean()}
    return row | elsewhere(material, direct)


def elsewhere(material, right) -> dict:
    """Return accuracy on GSM8K's test problems, where they are at hand: all, and those of one or two equations."""
    if not material.get("gsm8k"):
        return {}
    found = right(material["gsm8k"])
    return {"gsm8k": found.mean(), "gsm8k_easy": found[[p["difficulty"] <= 2 for p in material["gsm8k"]]].mean()}


def outcomes(right: np.ndarray) -> str:
    """Return 0 and 1 of each problem in one string."""
    return "r" + "".join(str(int(x)) for x in right)


def reinforce_arm(variant, material, start: Path, changed: dict, seed: int, checkpoint):
    """Train thoughts from the baked model in ``start`` and return (model, tokenizer, numbers of the training)."""
    s = trained_with(variant, changed, seed)
    lm, tokenizer = load_champion(str(start))
    budget = {"num_thoughts": s.num_thoughts, "thought_length": s.thought_length, "n_true": s.n_true}
    values = recipe("05_rl", variant)
    model = QuietStarForCausalLM.from_base(lm, tokenizer, **budget, gate=values["gate"])
    validation = material["validation"][: values["eval_problems"]]
    result = train_quiet_star(model, tokenizer, material["train"], validation, s, checkpoint)
    seen = [h["validation_accuracy"] for h in result.history if "validation_accuracy" in h]
    row = {"best_step": result.best_step, "validation": [round(v, 4) for v in seen]}
    kept = ("reward", "length", "entropy", "tied", "no_thought_weight", "kl")
    return model, tokenizer, row | {k: round(result.history[-1][k], 4) for k in kept if k in result.history[-1]}


def iterate_arm(variant, material, start: Path, seed: int, rounds: int = 3):
    """Train by expert iteration (STaR, arXiv 2203.14465) from the baked model, and return as :func:`reinforce_arm`.

    Each round samples thoughts for the training problems, keeps two of each problem that lead to its answer, and
    imitates them for an epoch. Unlike STaR it goes on from the last round's weights. The best round stays.
    """
    s, rl = baked_with(variant, {}, seed)[0], trained_with(variant, {}, seed)
    lm, tokenizer = load_champion(str(start))
    model = QuietStarForCausalLM.from_base(lm, tokenizer)
    budget = {"thought_length": rl.thought_length, "temperature": rl.temperature}
    score = partial(accuracy_with_thoughts, model, tokenizer, material["validation"], "thoughts", **budget, seed=seed)
    best, seen, tags = None, [], tokens.thinking_ids(tokenizer)
    for turn in range(rounds + 1):
        seen.append(score()["mixed"].mean().item())
        if seen[-1] == max(seen):
            best = {name: value.clone() for name, value in lm.state_dict().items()}
        if turn == rounds:
            break
        problems = random.Random(seed + turn).sample(material["train"], min(SEEN, len(material["train"])))
        many = budget | {"num_thoughts": SAMPLES, "seed": seed + turn}
        drawn = accuracy_with_thoughts(model, tokenizer, problems, "thoughts", True, **many)
        texts = []
        for p, right, thoughts in zip(problems, drawn["each"], drawn["thoughts"], strict=True):
            answer = tokens.encode(tokenizer, p["question"], reply(None, p))
            for text in sorted({t for t, r in zip(thoughts, right, strict=True) if r})[:2]:
                thought = [tags[0], *tokenizer.encode(text, add_special_tokens=False), tags[1]]
                texts.append((answer.ids[: answer.start], thought + answer.ids[answer.start :]))
        if texts:  # no thought was right: the next round draws others
            imitate(lm, tokenizer, texts, s.but(epochs=1, adamw_lr=rl.adamw_lr, lora_rank=rl.lora_rank))
    lm.load_state_dict(best)
    return model, tokenizer, {"validation": [round(v, 4) for v in seen], "best_step": seen.index(max(seen))}


def theater_row(folder, model, before, tokenizer, material, controls: dict, stage: str, **budget) -> dict:
    """Attack a trained model on test problems and return its checks' values with intervals.

    ``before``: the (model, tokenizer) it was trained from. ``controls``: of each model trained without thoughts 0 or 1
    a problem. ``stage``: its name in ``folder/episodes-<stage>-<seed>.jsonl``. ``budget``: how thoughts are drawn.
    """
    before, size = QuietStarForCausalLM.from_base(*before), len(material["test"])
    given = attack_arguments(model, tokenizer, before, material, size, **budget)
    report = anti_theater(**given, controls=controls, stage=stage)
    kept = "".join(f"{to_json(e.model_dump())}\n" for e in report.episodes[:24])
    write_bytes(folder / f"episodes-{stage}-{budget['seed']}.jsonl", kept.encode())
    row = {"attacked": len(material["test"]), "checks": len(report.checks), "missed": ", ".join(report.missed)}
    row |= {"checks_reached": row["checks"] - len(report.missed)}
    for check in report.checks:
        row |= named(check.id, (check.value, check.low, check.high))
    return row | {f"accuracy_{name}": value[0] for name, value in report.accuracy.items()}


def measured_arm(variant, folder, material, settings, seed, checkpoint) -> dict:
    """Train one arm and measure it. What the recipes give without a change is kept in ``folder/models``: the baked
    model, which other arms start from, and the reinforced one's difference. Both are attacked as well.
    """
    kind, changed = settings["train"], {k: v for k, v in settings.items() if k != "train"}
    length, start = trained_with(variant, {}, seed).thought_length, folder / "models" / f"baked-{seed}"
    if kind in ("answers", "filler"):
        return control_arm(variant, material, kind, CONTROL_RATES, seed)
    if kind == "nothing":
        return raw_row(variant, material)
    if kind in ("thoughts", "rounds") and not start.is_dir():  # its row may be committed, the model never is
        lm, tokenizer, _ = bake_arm(variant, material, {}, seed, checkpoint)
        discard(checkpoint.folder)
        save_whole(start, lm, tokenizer)
    if kind == "baking":
        lm, tokenizer, row = bake_arm(variant, material, changed, seed, checkpoint)
        model = QuietStarForCausalLM.from_base(lm, tokenizer)
        if not changed:
            save_whole(start, lm, tokenizer)
    elif kind == "rounds":
        model, tokenizer, row = iterate_arm(variant, material, start, seed)
    else:
        model, tokenizer, row = reinforce_arm(variant, material, start, changed, seed, checkpoint)
    weights = "head" if kind == "thoughts" else "thoughts"
    found, performance = thinking_row(model, tokenizer, material, weights, length, seed)
    row |= found
    if changed or kind == "rounds":
        return row
    stage, before = ("reinforced", load_champion(str(start))) if kind == "thoughts" else ("baked", champion(variant))
    if kind == "thoughts":
        source = recipe("01_token_setup", variant)["champion"]
        baking, rank = baked_with(variant, {}, seed)[0], trained_with(variant, {}, seed).lora_rank
        rank += baking.lora_rank * (1 + bool(baking.prompt_epochs))  # all adapters that were merged: nothing is lost
        row["rounding"] = save_difference(folder / "models" / f"difference-{seed}", model, tokenizer, source, rank)
    attacked = material | {"test": material["test"][: recipe("06_anti_theater", variant)["problems"]]}
    alone = [r for r in read_rows(folder / f"{variant}.csv") if r["settings"]["train"] in ("answers", "filler")]
    controls = {r["arm"]: [int(x) for x in r["right"][1:]] for r in alone if r["seed"] == seed}
    budget = {"num_thoughts": 4, "thought_length": length, "temperature": performance.temperature or 0.5, "seed": seed}
    return row | theater_row(folder, model, before, tokenizer, attacked, controls, stage, weights=weights, **budget)


def describe(material) -> list[dict]:
    """Return of each test problem its number of ``steps``, and whether a training question is ``near`` it (0 or 1).

    Near is one that shares nine tenths of all their words, whatever names and numbers differ.
    """
    words = lambda p: frozenset(_WORD.findall(p["question"].lower()))  # whatever its numbers
    read = {words(p) for p in material["train"]}  # many are the same template
    near = lambda mine: any(len(mine & other) >= 0.9 * len(mine | other) for other in read)
    return [{"steps": len(p["steps"]), "near": int(near(words(p)))} for p in material["test"]]


def real_model(folder: Path, seeds, variant: str, data: str = "", gsm8k: str = "", arms=None) -> None:
    """Make all arms, or those named, on all ``seeds``: rows of ``<variant>.csv``, all of the same test problems."""
    drawn = cache(partial(material, variant, data))  # by seed
    if read_rows(told := folder / f"{variant}_problems.csv") not in ([], kinds := describe(drawn(0))):
        raise StageError(f"the rows in {folder} are of other test problems than DATA gives: move them away first")
    write_rows(told, kinds)
    further = {"gsm8k": list(load_problems(gsm8k, "test")) if gsm8k else []}
    once = lambda settings, seed, *more: measured_arm(variant, folder, drawn(seed) | further, settings, seed, *more)
    repeat(folder / f"{variant}.csv", {name: TRAINED_ARMS[name] for name in arms or TRAINED_ARMS}, seeds, once)
    if gains := paired(read_rows(folder / f"{variant}.csv"), "reinforced", "answers alone", "accuracy"):
        write_criterion(folder, "over_answers_alone", gains, f"make evidence X={variant}")
