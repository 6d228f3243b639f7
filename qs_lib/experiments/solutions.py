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
from ..evaluation.accuracy import Budget
from ..evaluation.likelihood import (
    CONTROLS,
    log_likelihood_gain,
    placed,
    plain_log_likelihood,
    text_log_likelihood,
    with_temperature,
)
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
    | {"thought_length": 16, "temperature": 1.0, "n_true": 8, "reward": "likelihood", "pass_low": 0.0, "pass_high": 1.0}
    | {"nll_weight": 0.5, "thought_nll_weight": 0.5, "adamw_lr": 3e-4, "base_kl": 1.0, "evaluate_every": 10}
}
LESSONS = {"epochs": 1, "batch_size": 8}  # how imitation differs from the recipe of 03
TRAINED = 200  # solutions that are read in training
FOR_HEAD, JUDGED = 48, 8  # others, for the head and for validation
READ_LAST, PLACES = 32, 12  # those of the test split, and places in each, evenly spaced
_RESULT = re.compile(r"=\s*\$?[\d,.]*\d$")
_WORDS = re.compile(rf"\b({'|'.join(PLAIN_WORDS.values())})\b", re.IGNORECASE)


def read_solutions(folder: str, split: str) -> list[dict]:
    """Return the solutions of a GSM8K folder's split as stories, without those that say a thinking token's word.

    Raises ``SourceError`` if the folder has no such file.
    """
    path = Path(folder) / f"{split}.jsonl"
    if not path.is_file():
        raise SourceError(f"no solutions at {path}: give the folder of GSM8K's .jsonl files (GSM8K=folder)")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    told = [solution_text(row["question"], row["answer"]) for row in rows]
    return [story for story in told if story["results"] and not _WORDS.search(" ".join(text_of(story)))]


def solution_lessons(tokenizer, told: list[dict], seed: int) -> list[tuple[list[int], list[int]]]:
    """Return (context, reply) ids: each solution read plainly, and a worked thought in two of its results.

    A thought stands before the sentence or before one of its numbers, whose space is a token of its own at times.
    """
    rng, texts = random.Random(seed), []
    for story in told:
        whole = encode(tokenizer, *text_of(story))
        ids, begins = whole.ids, whole.start
        texts.append((ids[:begins], ids[begins:]))
        for result in rng.sample(story["results"], min(2, len(story["results"]))):
            first = len(encode_context(tokenizer, result["before"]))
            last = first + len(encode_reply(tokenizer, result["answer"]))
            digits = [tokenizer.decode([i]).strip().isdigit() for i in ids]
            numbers = [i for i in range(first, last) if digits[i] and not digits[i - 1]]
            at = rng.choice([first, *numbers])
            texts.append((ids[:at], worked_thought(tokenizer, result) + ids[at:last]))
    return texts


def worked_thought(tokenizer, result: dict) -> list[int]:
    """Return the ids of a thought that holds the true equations of a result's sentence, tags included."""
    return encode_marked(tokenizer, f"think {body('cot', result['steps'], [])} done")


def says_result(tokenizer, texts, positions: int) -> np.ndarray:
    """Return whether the next token at each place of ``text_log_likelihood`` is of a number behind ``=``."""
    rows = []
    for ids, _, at in placed(tokenizer, texts, positions, 1, "cpu"):
        rows.append([bool(_RESULT.search(tokenizer.decode(ids[0, : i + 2]))) for i in at[0].tolist()])
    return np.array(rows)


def measured_texts(model, tokenizer, texts, held, **budget) -> dict:
    """Return gains in nats per token over each control: on all tokens, on results, and on the hardest tenth."""
    scores = text_log_likelihood(model, tokenizer, texts, positions=PLACES, controls=True, **budget)
    plain = [plain_log_likelihood(model, tokenizer, part, positions=PLACES) for part in (texts, held)]
    (scores, _), row, said = with_temperature(scores, *plain), {}, says_result(tokenizer, texts, PLACES)
    for control in CONTROLS:
        found = log_likelihood_gain(scores, control=control)
        gain = np.where(said, scores["with"] - scores[control], np.nan)
        found["results"] = interval(np.nanmean(gain[~np.isnan(gain).all(1)], 1))
        for part, value in found.items():
            row |= named(f"{part}_over_{control}", value)
    row |= {
        "plain": np.nanmean(scores["without"]),
        "plain_results": np.nanmean(np.where(said, scores["without"], np.nan)),
    }
    return {name: round(float(value), 5) for name, value in row.items()}


@torch.no_grad()
def at_results(model, tokenizer, told: list[dict], **budget) -> dict:
    """Return what thoughts are worth at the first number behind ``=`` of each solution, one digit each.

    ``result_plain`` and ``result_told``: its mean log-prob in nats, without a thought and after the true equations.
    ``thoughts_true``: the share of the model's own thoughts there that hold the true result of the last equation.
    """
    plain, after, truths, results = [], [], [], []
    for story in told:
        ids, said = encode(tokenizer, *text_of(story)).ids, story["results"][0]
        first = len(encode_context(tokenizer, said["before"]))
        last = first + len(encode_reply(tokenizer, said["answer"]))
        at = next((i for i in range(first, last) if _RESULT.search(tokenizer.decode(ids[: i + 1]))), None)
        if at:
            plain.append(ids[:at])
            after.append(ids[:at] + worked_thought(tokenizer, said))
            truths.append(ids[at])
            results.append(said["steps"][-1].split("= ")[-1])
    row = {}
    for name, rows in (("result_plain", plain), ("result_told", after)):
        logits = logits_at(model.lm, rows, [[len(r) - 1] for r in rows], tokenizer)
        row[name] = -torch.nn.functional.cross_entropy(logits, torch.tensor(truths, device=logits.device)).item()
    budget = Budget(**budget)
    ids, mask = padded(tokenizer, plain, model.device)
    thoughts = model.think(ids, mask, mask.sum(1, keepdim=True) - 1, budget.generator(), **budget.drawing)
    own = [[in_words(tokenizer.decode(t)) for t in drawn] for drawn in thoughts.tokens[:, 0].tolist()]
    right = [[f"= {result} " in f"{t} " for t in drawn] for drawn, result in zip(own, results, strict=True)]
    return row | {"thoughts_true": float(np.mean(right))}


def solutions(folder: Path, seeds, variant: str, gsm8k: str) -> list[dict]:
    """Teach the variant's champion to think before sentences that state results, reinforce, fit the head, and measure.

    Rows of ``solutions.csv``, a training each. Worked thoughts are the sentences' equations, written by a program.
    """
    told, test = read_solutions(gsm8k, "train"), read_solutions(gsm8k, "test")[:READ_LAST]
    held, told = told[: FOR_HEAD + JUDGED], told[FOR_HEAD + JUDGED :][:TRAINED]

    def once(changed: dict, seed: int, checkpoint) -> dict:
        s, (lm, tokenizer) = trained_with(variant, changed, seed), champion(variant)
        imitate(lm, tokenizer, solution_lessons(tokenizer, told, seed), baked_with(variant, LESSONS, seed)[0])
        budget = {"num_thoughts": s.num_thoughts, "thought_length": s.thought_length}
        model = QuietStarForCausalLM.from_base(lm, tokenizer, gate="place", n_true=s.n_true, **budget)
        result = train_quiet_star(model, tokenizer, told, held[:JUDGED], s, checkpoint)
        budget |= {"temperature": s.temperature, "seed": seed}
        fit_mixing_head(model, tokenizer, (), held[JUDGED:], **budget)
        model.save_pretrained(folder / ".solutions" / str(seed))
        row = measured_texts(
            model, tokenizer, [text_of(s) for s in test], [text_of(s) for s in held[JUDGED:]], **budget
        )
        found = {name: round(value, 5) for name, value in at_results(model, tokenizer, test, **budget).items()}
        return row | found | {"text_gains": [round(h["gain"], 4) for h in result.history]}

    return repeat(folder / "solutions.csv", TRAININGS, seeds, once)
