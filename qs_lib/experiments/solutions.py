"""Thoughts inside text that people wrote, by a pretrained model: GSM8K's worked solutions."""

import json
import random
import re
from pathlib import Path

import numpy as np
import torch

from ..data.batches import text_of
from ..data.problems import solution_text
from ..data.strategies import body
from ..data.tokens import PLAIN_WORDS, encode, encode_context, encode_marked, encode_reply, in_words, padded
from ..errors import SourceError
from ..evaluation import likelihood
from ..evaluation.accuracy import Budget
from ..model import QuietStarForCausalLM
from ..stats import interval, named
from ..training.baking import logits_at
from ..training.heads import fit_mixing_head
from ..training.imitation import imitate
from ..training.reinforce import train_quiet_star
from .arms import repeat
from .real_model import baked_with, champion, trained_with

# What differs from the variant's recipe of 05: thoughts in texts, likelihood beside the reward, which is a gain in nats.
# The sizes are an hour of one CPU core for a seed.
TRAININGS = {
    "solutions": {"think_at": "random", "num_positions": 4, "over": 1, "batch_size": 8, "steps": 10, "num_thoughts": 4}
    | {"thought_length": 20, "temperature": 1.0, "n_true": 8, "reward": "likelihood", "pass_low": 0.0, "pass_high": 1.0}
    | {"nll_weight": 0.5, "thought_nll_weight": 0.5, "adamw_lr": 3e-4, "base_kl": 1.0, "evaluate_every": 10}
}
TRAININGS["working left out"] = TRAININGS["solutions"] | {"working": False}  # texts that state results alone
LESSONS = {"epochs": 1, "batch_size": 4}  # how imitation differs from the recipe of 03
TRAINED = 500  # solutions that are read in training
TOLD = 0.5  # the share of results with a thought: in the others the model learns to do without
FOR_HEAD, JUDGED = 128, 8  # others, for the head and for validation
READ_LAST, PLACES = 48, 12  # those of the test split, and places in each, evenly spaced
_RESULT, _NUMBER = re.compile(r"=\s*\$?([\d,.]*\d)"), re.compile(r"\d(?:[\d,.]*\d)?")
_CALCULATES = re.compile(r"[=+*/×÷]|\d\s*-\s*\d|\d\s*x\s")
_WORDS = re.compile(rf"\b({'|'.join(PLAIN_WORDS.values())})\b", re.IGNORECASE)


def read_solutions(folder: str, split: str, working: bool = True) -> list[dict]:
    """Return the solutions of a GSM8K folder's split as stories, without those that say a thinking token's word.

    Without ``working`` their calculations are left out, and so are solutions where words stand inside of calculations.
    Raises ``SourceError`` if the folder has no such file.
    """
    if not (path := Path(folder) / f"{split}.jsonl").is_file():
        raise SourceError(f"no solutions at {path}: give the folder of GSM8K's .jsonl files (GSM8K=folder)")
    rows = map(json.loads, path.read_bytes().splitlines())
    told = [solution_text(row["question"], row["answer"], working) for row in rows]
    told = [story for story in told if working or not _CALCULATES.search(story["story"])]
    return [story for story in told if story["results"] and not _WORDS.search(" ".join(text_of(story)))]


def solution_lessons(tokenizer, told: list[dict], seed: int) -> list[tuple[list[int], list[int]]]:
    """Return (context, reply) ids: each solution once, with worked thoughts in the sentences of some of its results.

    Half of the thoughts stand directly before the result (:func:`results_in`), the others anywhere in the sentence.
    """
    rng, texts = random.Random(seed), []
    for story in told:
        ids, begins = (whole := encode(tokenizer, *text_of(story))).ids, whole.start
        reply, done, said = [], begins, results_in(tokenizer, ids, begins)
        for result in (r for r in story["results"] if rng.random() < TOLD):
            first, last, number = places(tokenizer, said, result)
            at = number if number and rng.random() < 0.5 else rng.randrange(first, last)
            reply += ids[done:at] + worked_thought(tokenizer, result)
            done = at
        texts.append((ids[:begins], reply + ids[done:]))
    return texts


def results_in(tokenizer, ids: list[int], begins: int) -> np.ndarray:
    """Return which tokens of a text, a story from token ``begins`` on, end in a digit of a result.

    Results are the numbers behind ``=``. In a story without one they are those that the text before does not hold.
    """
    text, ends = tokenizer.decode(ids), [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    told, numbers = ends[begins - 1], list(_NUMBER.finditer(text))
    if "=" in text[told:]:
        spans = [found.span(1) for found in _RESULT.finditer(text)]
    else:
        first = {found[0]: found.span() for found in reversed(numbers)}.values()
        spans = [(start, end) for start, end in first if start >= told]
    return np.array([any(a < end <= b for a, b in spans) and text[end - 1].isdigit() for end in ends])


def places(tokenizer, results: np.ndarray, result: dict) -> tuple[int, int, int | None]:
    """Return where a result's sentence begins and ends in a text with ``results_in``, and its first digit or None."""
    first = len(encode_context(tokenizer, result["before"]))
    last = first + len(encode_reply(tokenizer, result["answer"]))
    said = np.flatnonzero(results[first:last])
    return first, last, first + int(said[0]) if len(said) else None


def worked_thought(tokenizer, result: dict) -> list[int]:
    """Return the ids of a thought that holds the true equations of a result's sentence, tags included."""
    return encode_marked(tokenizer, f"think {body('cot', result['steps'], [])} done")


def says_result(tokenizer, texts, positions: int) -> np.ndarray:
    """Return whether the next token at each place of ``text_log_likelihood`` is of a result."""
    whole, each = [encode(tokenizer, *text) for text in texts], likelihood.placed(tokenizer, texts, positions, 1, "cpu")
    said = [results_in(tokenizer, one.ids, one.start) for one in whole]
    return np.array([found[at[0] + 1] for found, (_, _, at) in zip(said, each, strict=True)])


def plain_means(plain: np.ndarray, said: np.ndarray) -> dict:
    """Return the mean log-prob without thoughts, in nats per token, of all tokens and of results (where ``said``)."""
    return {"plain": np.nanmean(plain), "plain_results": np.nanmean(np.where(said, plain, np.nan))}


def measured_texts(model, tokenizer, texts, held, **budget) -> dict:
    """Return gains in nats per token over each control: on all tokens, on results, and on the hardest tenth."""
    scores, _ = likelihood.controlled_log_likelihood(model, tokenizer, texts, held, PLACES, **budget)
    row, said = {}, says_result(tokenizer, texts, PLACES)
    for control in likelihood.CONTROLS:
        found = likelihood.log_likelihood_gain(scores, control=control)
        gain = np.where(said, scores["with"] - scores[control], np.nan)
        found["results"] = interval(np.nanmean(gain[~np.isnan(gain).all(1)], 1))
        for part, value in found.items():
            row |= named(f"{part}_over_{control}", value)
    return row | plain_means(scores["without"], said)


@torch.no_grad()
def at_results(model, tokenizer, told: list[dict], **budget) -> dict:
    """Return what thoughts are worth at the first number behind ``=`` of each solution, one digit each.

    Its mean log-prob in nats: ``result_plain`` without a thought, ``result_mixed`` with the model's own,
    ``result_alone`` with these alone, whatever the gate says, and ``result_told`` after the true equations.
    ``thoughts_true``: the share of its own thoughts there that hold the true result of the last equation.
    """
    rows, after, results = [], [], []
    for story in told:
        ids, said = (whole := encode(tokenizer, *text_of(story))).ids, story["results"][0]
        if at := places(tokenizer, results_in(tokenizer, ids, whole.start), said)[2]:
            rows.append(ids[: at + 1])
            after.append(ids[:at] + worked_thought(tokenizer, said))
            results.append(said["steps"][-1].split("= ")[-1])
    logits = logits_at(model.lm, after, [[len(r) - 1] for r in after])
    logits[:, list(model.config.hidden_ids)] = -torch.inf
    truths, budget = torch.tensor([r[-1] for r in rows], device=logits.device), Budget(**budget)
    ids, mask = padded(tokenizer, rows, model.device)
    thoughts = model.think(ids, mask, mask.sum(1, keepdim=True) - 2, budget.generator(), **budget.drawing)
    found = likelihood.predicted(model, ids, mask, thoughts)
    own = [tokenizer.batch_decode(t) for t in thoughts.tokens[:, 0]]
    right = [[f"= {result} " in f"{in_words(t)} " for t in drawn] for drawn, result in zip(own, results, strict=True)]
    by = {"plain": "without", "mixed": "with", "alone": "alone"}
    row = {f"result_{name}": found[key].mean().item() for name, key in by.items()}
    row["result_told"] = -torch.nn.functional.cross_entropy(logits, truths).item()
    return row | {"thoughts_true": float(np.mean(right))}


def solutions(folder: Path, seeds, variant: str, gsm8k: str) -> list[dict]:
    """Teach the variant's champion to think before sentences that state results, reinforce, fit the head, and measure.

    Rows of ``solutions.csv``, a training each. Worked thoughts are the sentences' equations, written by a program.
    """

    def once(changed: dict, seed: int, checkpoint) -> dict:
        working = changed.get("working", True)
        told, test = (read_solutions(gsm8k, split, working) for split in ("train", "test"))
        held, told, test = told[: FOR_HEAD + JUDGED], told[FOR_HEAD + JUDGED :][:TRAINED], test[:READ_LAST]
        s = trained_with(variant, {name: value for name, value in changed.items() if name != "working"}, seed)
        lm, tokenizer = champion(variant, folder.parent)
        budget = {"num_thoughts": s.num_thoughts, "thought_length": s.thought_length}
        model = QuietStarForCausalLM.from_base(lm, tokenizer, gate="place", n_true=s.n_true, **budget)
        budget |= {"temperature": s.temperature, "seed": seed}
        texts, judged = ([text_of(story) for story in part] for part in (test, held[JUDGED:]))
        plain = likelihood.plain_log_likelihood(model, tokenizer, texts, PLACES)[likelihood.SHARPENINGS.index(1.0)]
        untrained = plain_means(plain, says_result(tokenizer, texts, PLACES))
        found = {f"untrained_{name}": value for name, value in untrained.items()}
        imitate(lm, tokenizer, solution_lessons(tokenizer, told, seed), baked_with(variant, LESSONS, seed)[0])
        found |= {f"imitated_{name}": value for name, value in at_results(model, tokenizer, test, **budget).items()}
        result = train_quiet_star(model, tokenizer, told, held[:JUDGED], s, checkpoint)
        fit_mixing_head(model, tokenizer, (), held[JUDGED:], **budget)
        model.save_pretrained(folder / ".solutions" / f"{seed}{'' if working else '-left-out'}")
        found |= measured_texts(model, tokenizer, texts, judged, **budget)
        found |= at_results(model, tokenizer, test, **budget)
        return found | {"text_gains": [round(h["gain"], 4) for h in result.history]}

    return repeat(folder / "solutions.csv", TRAININGS, seeds, once)
