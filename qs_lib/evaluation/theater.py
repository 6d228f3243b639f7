"""Anti-theater: checks that try to prove the thoughts are for show. Each can fail, and planted cheats make them.

The same thoughts are read in every attack. ``verdict.CHECKS`` lists what each check compares and the bar it must reach.

- Used: answers are worse with no thoughts, another problem's, shuffled ones, filler, or without the last step, and than
  those of models that were trained as long without thoughts.
- Followed: a thought with one number altered leads to another answer. The answer is not there early, is not what a
  linear probe reads before the thought, and is not a hint that no thought mentions.
- Legible: the answer holds when sums are turned round or put in other words and when idle steps are left out, and
  another model that reads the thoughts gains by them too.
- Honest harness: thoughts come out again from model, question and seed, they do not see what follows, they differ from
  those before training, and no question was trained on.
- Told apart: label-free coherence goes with utility over single thoughts.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm

from ..data import Problem
from ..data.tokens import thinking_ids
from ..errors import WorkbookError
from ..settings import Settings
from ..stats import Reliability, correlation, interval, reliability, votes
from . import attacks
from .accuracy import answer_of, end_ids, longest_answer, replies
from .attacks import ATTACKS, REWRITTEN, Measured, Subject, stacked
from .belief import Practice
from .coherence import Scale, coherence
from .episodes import Episode, as_episodes, by_problem, score_thoughts
from .verdict import CHECKS, Check, judge

QUICK = 40  # problems of a quick look


class TheaterSettings(Settings):
    """How thoughts are drawn, mixed and answered with when they are attacked."""

    num_thoughts: int = Field(4, ge=1)  # a problem
    thought_length: int = Field(28, ge=2)  # most tokens, both tags counted
    temperature: float = Field(1.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)
    batch_size: int = Field(120, ge=1)  # questions
    weights: Literal["head", "thoughts", "none"] = "head"  # how thoughts are mixed, see `decode_with_thoughts`
    max_new_tokens: int = Field(6, ge=1)  # of an answer
    hint: str = "so {number} . {question}"  # how a wrong number is put into a question
    quick: bool = False  # a look at ``QUICK`` problems with the cheapest attacks


class Cost(NamedTuple):
    """What an attack took: thoughts drawn, thoughts read for an answer, and seconds."""

    drawn: int
    read: int
    seconds: float


@dataclass
class TheaterReport:
    """The ``checks``, what they were judged by (``measured``: arrays with one row a problem), and what each array cost.

    Beside the checks, as (value, low, high): ``within_r``, the correlation of coherence and utility inside problems,
    ``diversity``, the edit distance between the thoughts of a problem, and ``matched_divergence``, their distance from
    a direct continuation of equal length. ``reliability``: of the mixing ``weight``, of the ``vote`` and of
    ``coherence``. ``table``: one row for each thought. ``episodes``: the groups.
    """

    checks: list[Check]
    measured: Measured
    cost: dict[str, Cost]
    within_r: tuple[float, float, float]
    diversity: tuple[float, float, float]
    matched_divergence: tuple[float, float, float]
    reliability: dict[str, Reliability]
    table: list[dict]
    episodes: list[Episode]

    @property
    def passed(self) -> bool:
        return all(c.reached for c in self.checks)

    @property
    def missed(self) -> list[str]:
        """The ids of the checks that were not reached."""
        return [c.id for c in self.checks if not c.reached]

    @property
    def accuracy(self) -> dict[str, tuple[float, float, float]]:
        """The accuracy with its interval under each attack that leaves a thought and a question."""
        return {name: interval(self.measured[name]) for name in (*ATTACKS, *REWRITTEN) if name in self.measured}

    @property
    def verdict(self) -> str:
        """One sentence: not theater; or theater, and what caught it; or which checks too few problems left open."""
        if self.missed:
            certain = not all(self.check(i).undecided for i in self.missed)
            listed = "; ".join(f"{i} ({self.check(i).sentence})" for i in self.missed)
            return f"THEATER, caught by {listed}" if certain else f"NOT SHOWN, too few problems to tell: {listed}"
        left_out = [name for name in CHECKS if name not in {c.id for c in self.checks}]
        return "NOT THEATER: every check was passed" + (f"; not made: {', '.join(left_out)}" if left_out else "")

    def check(self, id: str) -> Check:
        """Return the check of that id. Raises ``KeyError`` where it was not made."""
        return {c.id: c for c in self.checks}[id]

    def to_dict(self) -> dict:
        """Return everything but the single problems and thoughts, ready for JSON."""
        kept = ("passed", "verdict", "checks", "accuracy", "within_r", "diversity", "matched_divergence")
        found = {name: getattr(self, name) for name in kept} | {"checks": [asdict(c) for c in self.checks]}
        return found | {"reliability": {k: asdict(v) for k, v in self.reliability.items()}}


# It has eleven parameters: models and questions to compare with are optional, and a check's own each.
@torch.no_grad()
def anti_theater(
    model,
    tokenizer,
    problems,
    scale=None,
    before=None,
    training=None,
    think=None,
    score=coherence,
    stage="",
    reader=None,
    controls=None,
    **given,
) -> TheaterReport:
    """Attack a ``QuietStarForCausalLM`` on held-out problems, with the checks of ``verdict.CHECKS``.

    ``given``: the settings of ``TheaterSettings``. ``scale``: of coherence. What is not given is not compared with, and
    the verdict says so: the model ``before`` training, the ``training`` questions or problems that were trained or
    selected on, a causal LM as ``reader`` of the thoughts, and ``controls``, for each model that was trained as long
    without thoughts 0 or 1 a problem. A probe learns answers from the ``training`` problems, else from the held-out ones.
    As a :class:`Practice` they are read once for all reports on a model.
    ``think(ids, mask, positions, generator, ...)`` and ``score`` replace the model's sampler and the coherence score,
    which is how some cheats are planted. ``stage``: the model's name in episodes. Raises ``WorkbookError``.
    """
    s = TheaterSettings(**given)
    problems = list(problems)[: QUICK if s.quick else None]
    if len(problems) < 2:
        raise WorkbookError("anti-theater needs at least two held-out problems: foreign thoughts come from another one")
    drawing = s.model_dump(include={"num_thoughts", "thought_length", "temperature", "seed", "batch_size"})
    scoring, started = {"weights": s.weights, "think": think, "score": score}, time.monotonic()
    drawn, rows = score_thoughts(model, tokenizer, problems, scale, room=s.max_new_tokens, **scoring, **drawing)
    subject = Subject(model, tokenizer, problems, stacked(drawn), drawing, s.weights, s.max_new_tokens)
    cost, measured = {"own": Cost(len(rows), 3 * len(rows), time.monotonic() - started)}, {}
    direct, endless = _direct(subject, max(s.thought_length, s.max_new_tokens))
    none = [answer_of(tokenizer, d[: s.max_new_tokens]) for d in direct]
    measured |= {"own": subject.right(subject.said), "none": subject.right(none)}
    measured["far"], matched, diversity = _distances(*subject.own, direct, endless)
    measured |= {name: by_problem(rows, name) for name in ("composite", "utility")}
    practice = training if isinstance(training, Practice) else Practice(training or ())
    steps = _steps(subject, s, think or model.think, practice)
    if before is not None:
        steps.append(partial(attacks.before_training, subject, before))
    if reader is not None:
        steps.append(partial(attacks.read_by, subject, reader))
    for step in tqdm(steps, desc="attack", leave=False):
        drawn_before, read_before, started = subject.drawn, subject.read, time.monotonic()
        made = step()
        spent = Cost(subject.drawn - drawn_before, subject.read - read_before, time.monotonic() - started)
        cost |= {name: Cost(0, 0, 0.0) if at else spent for at, name in enumerate(made)}  # all is paid for by the first
        measured |= made
    if training is not None:
        plain = lambda question: " ".join(question.lower().split())  # case and spacing make no other question
        seen = {plain(p if isinstance(p, str) else p["question"]) for p in training}
        measured["overlap"] = np.array([plain(q) in seen for q in subject.questions], float)
    if controls:
        measured["control"] = max(controls.values(), key=np.mean)[: len(problems)]
    within_r = correlation(measured["composite"], measured["utility"], s.seed, within=True)
    alone = np.array([answer_of(tokenizer, r["written"]) for r in rows], object).reshape(len(problems), -1)
    reliable = _reliabilities(rows, none, alone, subject.truth, s.seed)
    table = [{k: r[k] for k in ("problem", "thought", "coherence", "utility", "weight")} for r in rows]
    said = {"none": none, "own": subject.said.tolist()}
    episodes = as_episodes(tokenizer, problems, drawn, rows, said, stage)
    found = (within_r, interval(diversity), interval(matched), reliable, table, episodes)
    return TheaterReport(judge(measured), measured, cost, *found)


def _steps(subject: Subject, s: TheaterSettings, think, practice) -> list[partial]:
    """Return the attacks to make. A quick look makes the cheapest that ask for use and for following."""
    rng = np.random.default_rng(s.seed)  # what is swapped and shuffled is drawn in this order
    swapped = ("foreign",) if s.quick else attacks.ATTACKS[2:]
    steps = [partial(attacks.attacked, subject, name, rng) for name in swapped]
    steps.append(partial(attacks.altered_step, subject))
    if s.quick:
        return steps
    steps += [partial(attacks.rewritten, subject, name) for name in attacks.REWRITTEN]
    steps += [partial(attacks.early_answers, subject), partial(attacks.idle_steps, subject)]
    steps += [partial(attacks.hidden_hints, subject, s.hint), partial(attacks.blind, subject, think)]
    return [*steps, partial(attacks.belief, subject, practice), partial(attacks.drawn_again, subject)]


def _direct(subject: Subject, room: int) -> tuple[list, list]:
    """Return the greedy continuations without thoughts, as ids: up to their end, and ``room`` tokens without an end."""
    lm, tokenizer = subject.model.lm, subject.tokenizer
    tags = tuple(thinking_ids(tokenizer))
    direct = replies(lm, tokenizer, subject.questions, room, tags, desc="direct")
    ends = (*tags, *end_ids(lm, tokenizer))
    return direct, replies(lm, tokenizer, subject.questions, room, ends, desc="direct, run on")


def _distances(tokens, lengths, direct, endless):
    """Mean normalised distances of thoughts without tags from ``direct``, as much of ``endless``, and each other."""
    distance, drawn = Levenshtein.normalized_distance, zip(tokens.tolist(), lengths.tolist(), strict=True)
    inner = [[t[1 : n - 1] for t, n in zip(*thoughts, strict=True)] for thoughts in drawn]
    far = [[distance(t, d) for t in ts] for ts, d in zip(inner, direct, strict=True)]
    matched = [[distance(t, d[: len(t)]) for t in ts] for ts, d in zip(inner, endless, strict=True)]
    between = [[distance(a, b) for j, a in enumerate(ts) for b in ts[:j]] or [0.0] for ts in inner]
    return np.array(far), np.array(matched), np.array(between)


def _reliabilities(rows, direct: list[str], alone, truth, seed: int) -> dict[str, Reliability]:
    """How well a thought's mixing weight, its vote and its coherence tell whether it alone leads to the truth."""
    shares, right = by_problem(rows, "weight"), alone == truth[:, None]  # (problems, K)
    branches = np.concatenate([by_problem(rows, "no_thought")[:, :1], shares], 1)
    said = np.concatenate([np.array(direct, object)[:, None], alone], 1)
    scores = {"weight": shares, "vote": votes(branches, said), "coherence": by_problem(rows, "composite")}
    return {name: reliability(value, right, seed=seed) for name, value in scores.items()}


def fit_scale(model, tokenizer, problems: list[Problem], **settings) -> Scale:
    """Fit the coherence scale to thoughts on validation problems. No labels are read."""
    found = []
    keep = lambda *arguments: found.append(coherence(*arguments)) or found[-1]
    score_thoughts(model, tokenizer, list(problems), None, score=keep, **settings)
    names = found[0].raw if found else ()
    return Scale.fit({name: torch.cat([parts.raw[name].flatten() for parts in found]) for name in names})


def attack_arguments(model, tokenizer, before, data: dict[str, list[Problem]], size: int, **settings) -> dict:
    """Return arguments of :func:`anti_theater` for a model that was trained from ``before`` on a run's ``data``.

    ``size`` test problems are attacked, and coherence is scaled on as many of validation. ``settings``: of the drawing.
    """
    test, seen = data["test"][:size], data["train"] + data["validation"] + data["examples"]
    given = {"model": model, "tokenizer": tokenizer, "problems": test, "before": before, "training": seen}
    room = longest_answer(tokenizer, test)
    scale = fit_scale(model, tokenizer, data["validation"][:size], room=room, **settings)
    return given | {"scale": scale, "max_new_tokens": room, **settings}
