"""Thoughts anywhere in a text: one training for questions and for running text, and where in a text a thought pays."""

import json
import random
from pathlib import Path

import numpy as np

from ..champion import load_champion
from ..data.batches import text_of
from ..data.pocket import stories
from ..data.strategies import body, reply
from ..data.tokens import encode, encode_context, encode_marked
from ..evaluation import likelihood
from ..evaluation.theater import anti_theater, attack_arguments
from ..evaluation.where import area_under_curve, chosen, foreseen, gain_by_share
from ..files import write_bytes
from ..model import QuietStarForCausalLM
from ..stats import interval, named
from ..training.heads import fit_mixing_head
from ..training.imitation import imitate
from ..training.reinforce import RunningText, train_quiet_star
from ..workbook.stage import read_stage, stage_digest
from .arms import repeat
from .findings import write_criterion
from .organisms import TRAINING
from .organisms import story as worked
from .reinforcement import START, TRAINED_WITH, KeptAlone, baseline, loaded, measured, rl_recipe

OBJECTIVES = {"ours": {}, "rlp": {"objective": "rlp", "kl_coefficient": 0.0, "base_kl": 0.0}}
RECIPE = {"num_positions": 8, "steps": 120, "over": 2, "head_lr": 0.003, "evaluate_every": 60}
GATE, TEXT_SHARE = "place", 0.5  # what opens the gate, and the part of the loss that is running text
STORIES, ANSWERS, SOLUTIONS = 3000, 500, 1000  # texts that are read in training
FITTED_TO = 900, 300, 600, 1800  # the same for the head in the end, and questions: as many batches as of texts
ATTACKED = 240  # questions that anti-theater attacks
TESTED = 120  # texts of each kind that are measured, at every token
KINDS = ("stories", "answers", "solutions")
EXAMPLES = 3  # stories that are kept for the notebook, token by token
BUDGET = {"num_thoughts": 4, "thought_length": 28, "temperature": 1.0}
RULE = "has"  # the fixed rule: think after this word, behind which stories state their results


def story_lessons(tokenizer, told: list[dict], problems: list[dict], seed: int = 0) -> list[tuple]:
    """Return (context, reply) ids: stories read plainly, thoughts before two of each story's results, and questions.

    The questions, one for each story, are answered with a thought or at once, so that neither habit is lost.
    """
    rng, texts, end = random.Random(seed), [], [tokenizer.eos_token_id]
    for story in told:
        texts.append((encode_context(tokenizer, story["question"]), encode_marked(tokenizer, story["story"]) + end))
        for result in rng.sample(story["results"], min(2, len(story["results"]))):
            thought = f"think {body('cot', result['steps'], [])} done {result['answer']}"
            texts.append((encode_context(tokenizer, result["before"]), encode_marked(tokenizer, thought)))
    for p in rng.sample(problems, min(len(told), len(problems))):
        thought, asked = f"think {worked(p)} done " * (rng.random() < 0.5), encode_context(tokenizer, p["question"])
        texts.append((asked, encode_marked(tokenizer, thought + reply(None, p)) + end))
    return texts


def held_out(kind: str, problems: list[dict], split: str = "test") -> list[tuple[str, str]]:
    """Return texts of a kind: ``stories``, ``answers`` (questions with them) or worked ``solutions``."""
    if kind == "stories":
        return [text_of(story) for story in stories(split, TESTED)]
    return [text_of(p | {"steps": []} if kind == "answers" else p) for p in problems[:TESTED]]


def train_anywhere(model, tokenizer, data: dict, settings: dict, seed: int, checkpoint=None):
    """Teach a baked ``QuietStarForCausalLM`` to think before results of stories too, then reinforce both, in place.

    ``data``: problems by split. Running text in training is stories, questions with answers, and worked solutions.
    """
    told, s = stories("train", STORIES, seed), KeptAlone(**settings, seed=seed)
    lessons = story_lessons(tokenizer, told, data["train"], seed)
    imitate(model.lm, tokenizer, lessons, TRAINING.but(seed=seed), desc="stories")
    running = RunningText(told + task_texts(data["train"], ANSWERS, SOLUTIONS), TEXT_SHARE)
    return train_quiet_star(model, tokenizer, data["train"], data["validation"], s, checkpoint, running)


def fit_anywhere(model, tokenizer, data: dict, seed: int) -> list[float]:
    """Fit the mixing head of a trained model to thoughts in texts that it was not trained on, of each kind."""
    known = {text_of(story) for story in stories("train", STORIES, seed)}
    told = [story for story in stories("train", STORIES, seed + 1000) if text_of(story) not in known]
    texts = told[: FITTED_TO[0]] + task_texts(data["train"][ANSWERS + SOLUTIONS :], *FITTED_TO[1:3])
    return fit_mixing_head(model, tokenizer, data["train"][-FITTED_TO[3] :], texts, **BUDGET, seed=seed)


def task_texts(problems: list[dict], answers: int, solutions: int) -> list[dict]:
    """Return questions with answers, then worked solutions, as texts."""
    return [p | {"steps": []} for p in problems[:answers]] + problems[answers : answers + solutions]


def text_gains(model, tokenizer, data: dict, kind: str, seed: int) -> tuple[dict, dict, list]:
    """Return scores of every token with thoughts and each control, guesses of where they pay, and the texts."""
    texts, held = held_out(kind, data["test"]), held_out(kind, data["validation"], "validation")
    scores, _ = likelihood.controlled_log_likelihood(model, tokenizer, texts, held, 0, **BUDGET, seed=seed)
    guesses = foreseen(model, tokenizer, texts)
    behind = [tokenizer.convert_ids_to_tokens(encode(tokenizer, *text).ids[1:-1]) for text in texts]
    guesses["rule"] = np.full_like(guesses["entropy"], np.nan)
    for row, words in zip(guesses["rule"], behind, strict=True):
        row[: len(words)] = [word == RULE for word in words]
    return scores, guesses, texts


def measured_anywhere(model, tokenizer, data: dict, seed: int) -> tuple[dict, dict]:
    """Return a row's numbers on running text, and per-token values of a few stories for the notebook.

    ``KIND_over_CONTROL``: gain of the mixture in nats per token at every position, and ``..._hardest`` on the tenth of
    tokens that the plain model finds hardest. ``GUESS_area``: area under the curve of a guess against "a thought gains
    here". ``GUESS_shares``: the gain where the model thinks at the best guessed share ``SHARES`` of each text alone.
    """
    row, kept = {}, {}
    for kind in KINDS:
        scores, guesses, texts = text_gains(model, tokenizer, data, kind, seed)
        for control in likelihood.CONTROLS:
            found = likelihood.log_likelihood_gain(scores, control=control)
            row |= named(f"{kind}_over_{control}", found["all"])
            row |= named(f"{kind}_over_{control}_hardest", found["hardest"])
        if kind != "stories":
            continue
        gain = scores["with"] - scores["without"]
        for guess, values in guesses.items():
            row |= named(f"{guess}_area", area_under_curve(values, gain))
            row[f"{guess}_shares"] = [r["value"] for r in gain_by_share(gain, values)]
        random_share = gain * chosen(np.random.default_rng(seed).random(gain.shape) + 0 * gain, 0.1)
        over_random = np.where(chosen(guesses["expected"], 0.1), gain, 0.0) - random_share
        row |= named("tenth_over_random", interval(np.nanmean(over_random, 1)))
        kept = {"stories": [example(tokenizer, t, i, scores, guesses) for i, t in enumerate(texts[:EXAMPLES])]}
    return row, kept


def example(tokenizer, text, at: int, scores: dict, guesses: dict) -> dict:
    """Return one text token by token: words, plain log-prob, gain with thoughts, and where the head would think."""
    words = tokenizer.convert_ids_to_tokens(encode(tokenizer, *text).ids)
    count = len(words) - 2
    picked = chosen(guesses["expected"], 0.1)[at]
    numbers = {"plain": scores["without"], "gain": scores["with"] - scores["without"], "expected": guesses["expected"]}
    found = {name: [round(float(x), 3) for x in values[at][:count]] for name, values in numbers.items()}
    return {"words": words[2:], "thinks": [bool(x) for x in picked[:count]], **found}


def anywhere(run: Path, folder: Path, seeds) -> None:
    """Train questions and running text together, ours and RLP's objective, and write ``anywhere.csv``, a row a run.

    The first seed's stories go to ``anywhere.json``, models to ``.anywhere``, and the scoreboard's two numbers beside.
    """

    def once(settings: dict, seed: int, checkpoint) -> dict:
        row, kept = trained_and_measured(run, folder, settings, seed, checkpoint)
        if (settings, seed) == (arms["ours"], seeds[0]):
            write_bytes(folder / "anywhere.json", (json.dumps(kept) + "\n").encode())
        return row

    arms = {name: rl_recipe() | RECIPE | changed for name, changed in OBJECTIVES.items()}
    rows = repeat(folder / "anywhere.csv", arms, seeds, once, TRAINED_WITH)
    ours = [row for row in rows if row["arm"] == "ours"]
    worst = {  # of a seed's kinds of text, and of its controls
        "anywhere_nll": [min(row[f"{kind}_over_without"] for kind in KINDS) for row in ours],
        "hard_nll": [min(row[f"stories_over_{control}_hardest"] for control in likelihood.CONTROLS) for row in ours],
    }
    for name, values in worst.items():
        write_criterion(folder, name, values, "make evidence X=anywhere")


def trained_and_measured(run: Path, folder: Path, settings: dict, seed: int, checkpoint) -> tuple[dict, dict]:
    """Train once from the run's baked model. Return a row's numbers, and what ``measured_anywhere`` keeps."""
    plain, tokenizer, data = loaded(run, START)
    model = QuietStarForCausalLM.from_base(plain.lm, tokenizer, gate=GATE)
    result = train_anywhere(model, tokenizer, data, settings, seed, checkpoint)
    fit_anywhere(model, tokenizer, data, seed)
    model.save_pretrained(folder / ".anywhere" / f"{settings['objective']}-{seed}")
    before, _ = baseline(run, START, settings["thought_length"], seed)
    after, _ = measured(model, tokenizer, data, "head", settings["thought_length"], seed)
    row = {"accuracy": after.mixed.mean(), "baseline": before.mixed.mean()}
    row |= named("gain", interval(after.mixed - before.mixed)) | {"training_seconds": result.seconds}
    numbers, kept = measured_anywhere(model, tokenizer, data, seed)
    untrained, reader = loaded(run, START)[0], load_champion(str(run / "01_token_setup" / "champion"))[0]
    given = attack_arguments(model, tokenizer, untrained, data, ATTACKED, **BUDGET, seed=seed)
    report = anti_theater(**given, reader=reader)
    row |= numbers | {"checks": len(report.checks), "checks_reached": len(report.checks) - len(report.missed)}
    row |= {"missed": " ".join(report.missed), "text_gains": [round(h["text_gain"], 4) for h in result.history]}
    return row | {"data": stage_digest(read_stage(run / "03_baking")[0])[:12]}, kept
