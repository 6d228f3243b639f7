"""Thoughts inside text that people wrote, by a pretrained model: GSM8K's worked solutions."""

import json
import re
from pathlib import Path

import numpy as np

from ..data.batches import text_of
from ..data.problems import solution_text
from ..data.tokens import PLAIN_WORDS
from ..errors import SourceError
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
from ..training.heads import fit_mixing_head
from ..training.imitation import imitate
from ..training.reinforce import train_quiet_star
from .anywhere import story_lessons
from .arms import repeat
from .real_model import baked_with, champion, trained_with

# What differs from the variant's recipe of 05: thoughts in texts, likelihood beside the reward, which is a gain in nats.
TRAININGS = {
    "solutions": {"think_at": "random", "num_positions": 8, "over": 1, "batch_size": 16, "steps": 60, "num_thoughts": 4}
    | {"thought_length": 24, "temperature": 1.0, "n_true": 8, "reward": "likelihood", "pass_low": 0.0, "pass_high": 1.0}
    | {"nll_weight": 0.5, "thought_nll_weight": 0.5, "adamw_lr": 3e-4, "base_kl": 1.0, "evaluate_every": 20}
}
TRAINED = 3000  # solutions that are read in training
FOR_HEAD, JUDGED = 240, 32  # others, for the head and for validation
READ_LAST, PLACES = 240, 24  # those of the test split, and places in each, evenly spaced
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


def solutions(folder: Path, seeds, variant: str, gsm8k: str) -> list[dict]:
    """Teach the variant's champion to think before sentences that state results, reinforce, fit the head, and measure.

    Rows of ``solutions.csv``, a training each. Worked thoughts are the sentences' equations, written by a program.
    """
    told, test = read_solutions(gsm8k, "train"), [text_of(s) for s in read_solutions(gsm8k, "test")[:READ_LAST]]
    held, told = told[: FOR_HEAD + JUDGED], told[FOR_HEAD + JUDGED :][:TRAINED]

    def once(changed: dict, seed: int, checkpoint) -> dict:
        s, (lm, tokenizer) = trained_with(variant, changed, seed), champion(variant)
        imitate(lm, tokenizer, story_lessons(tokenizer, told, [], seed), baked_with(variant, {"epochs": 1}, seed)[0])
        budget = {"num_thoughts": s.num_thoughts, "thought_length": s.thought_length}
        model = QuietStarForCausalLM.from_base(lm, tokenizer, gate="place", n_true=s.n_true, **budget)
        result = train_quiet_star(model, tokenizer, told, held[:JUDGED], s, checkpoint)
        budget |= {"temperature": s.temperature, "seed": seed}
        fit_mixing_head(model, tokenizer, (), held[JUDGED:], **budget)
        row = measured_texts(model, tokenizer, test, [text_of(story) for story in held[JUDGED:]], **budget)
        return row | {"text_gains": [round(h["gain"], 4) for h in result.history]}

    return repeat(folder / "solutions.csv", TRAININGS, seeds, once)
