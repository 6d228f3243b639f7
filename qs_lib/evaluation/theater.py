"""Anti-theater: checks that try to prove the thoughts are for show. Each can fail, and planted cheats make them.

1. divergence: mean normalised edit distance of a thought from the direct greedy continuation, above 0.3. Beside it the
   same against a continuation of equal length, since a short answer is far from a long thought by length alone.
2. ablation_gain, foreign_gain, shuffled_gain, filler_gain: accuracy with own thoughts minus accuracy with none, with
   those of another problem, with their own tokens shuffled, with blank filler of the same length. Intervals above 0.
3. training_gain: the same minus the accuracy of the model before training with its own thoughts, as many, drawn alike,
   all weighted alike. Interval above 0. moved: some thoughts differ from those it draws with the same seed.
4. redrawn: all thoughts come out again, token by token, when the model's own sampler is given the questions alone.
   training_overlap: none of the questions is among those that were trained or selected on.
5. coherence_utility_r: Pearson correlation over single thoughts of label-free coherence and utility, above 0.5.

All intervals are 95 % bootstraps over problems.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm

from ..data import Problem
from ..data.tokens import encode_context, thinking_ids
from ..errors import WorkbookError
from ..settings import Settings
from ..stats import Reliability, correlation, interval, reliability, votes
from .accuracy import answer_of, end_ids, replies
from .coherence import Scale, coherence
from .episodes import Episode, answers_alone, answers_with, as_episodes, by_problem, draw_thoughts, score_thoughts

ATTACKS = ("own", "none", "foreign", "foreign_family", "shuffled", "filler", "last_step_deleted")
GAIN_OVER = {"none": "ablation_gain", "foreign": "foreign_gain", "shuffled": "shuffled_gain", "filler": "filler_gain"}
CHECKS = {  # what each check measures
    "divergence": "distance from the direct continuation",
    "ablation_gain": "accuracy with own thoughts minus none",
    "foreign_gain": "accuracy with own thoughts minus foreign",
    "shuffled_gain": "accuracy with own thoughts minus shuffled",
    "filler_gain": "accuracy with own thoughts minus filler",
    "training_gain": "accuracy with own thoughts minus that of the model before training, same budget",
    "moved": "share of thoughts that differ from those of the model before training, same seed",
    "redrawn": "share of thoughts that come out again from model, question and seed alone",
    "training_overlap": "share of evaluated questions that were trained or selected on",
    "coherence_utility_r": "correlation of coherence with utility",
}
MEANINGS = {  # what it means if it is missed
    "divergence": "thoughts repeat the direct continuation",
    "ablation_gain": "answers are no better with thoughts than without",
    "foreign_gain": "another problem's thoughts serve as well",
    "shuffled_gain": "the thought's words in any order serve as well",
    "filler_gain": "blank filler serves as well",
    "training_gain": "the model before training answers as well with its thoughts",
    "moved": "training never moved the thoughts",
    "redrawn": "the harness put something into the thoughts",
    "training_overlap": "the problems were seen in training",
    "coherence_utility_r": "coherence does not tell useful thoughts from useless ones",
}


class TheaterSettings(Settings):
    """How thoughts are drawn, mixed and answered with when they are attacked."""

    num_thoughts: int = Field(4, ge=1)  # a problem
    thought_length: int = Field(28, ge=2)  # most tokens, both tags counted
    temperature: float = Field(1.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)
    batch_size: int = Field(120, ge=1)  # questions
    n_true: int = Field(4, ge=1)  # true tokens that utility is the gain on
    weights: Literal["head", "thoughts", "none"] = "head"  # how thoughts are mixed, see `decode_with_thoughts`
    max_new_tokens: int = Field(6, ge=1)  # of an answer


def attacked_thoughts(attack: str, tokens, lengths, problems, tokenizer, rng):
    """Return thoughts ``(problems, K, T)`` and lengths ``(problems, K)`` as an attack leaves them. Tags stay in place.

    ``own`` is left as it is. The numpy generator ``rng`` picks other problems and orders.
    """
    tokens, lengths = tokens.clone(), lengths.clone()
    if attack in ("foreign", "foreign_family"):
        source = other_problem(problems, rng, same_family=attack == "foreign_family")
        return tokens[source], lengths[source]
    step = thinking_ids(tokenizer)[2]
    for b, k in np.ndindex(*lengths.shape) if attack in ("shuffled", "filler", "last_step_deleted") else ():
        end = lengths[b, k].item() - 1
        inner = tokens[b, k, 1:end]
        if attack == "shuffled":
            tokens[b, k, 1:end] = inner[torch.from_numpy(rng.permutation(len(inner)))]
        elif attack == "filler":
            tokens[b, k, 1:end] = step
        else:
            steps = (inner == step).nonzero()
            cut = 1 + (steps[-1].item() if len(steps) else 2 * len(inner) // 3)
            tokens[b, k, cut:] = tokens[b, k, end].item()
            lengths[b, k] = cut + 1
    return tokens, lengths


def other_problem(problems, rng, same_family: bool) -> torch.Tensor:
    """Draw for each problem the index of another with a different answer (of the same family where there is one)."""
    out = []
    for i, p in enumerate(problems):
        other = [j for j, q in enumerate(problems) if q["answer"] != p["answer"]]
        kin = [j for j in other if problems[j]["family"] == p["family"]] if same_family else other
        pick = kin or other or [j for j in range(len(problems)) if j != i]
        out.append(int(rng.choice(pick)))
    return torch.tensor(out)


@dataclass
class Check:
    """One test: ``value`` with its 95 % interval over problems against ``target``.

    ``sentence``: what it means if it is missed. ``undecided``: missed, but the interval reaches into the target, so
    that more problems could tell.
    """

    id: str
    criterion: str
    target: str
    value: float
    low: float
    high: float
    reached: bool
    undecided: bool
    sentence: str


@dataclass
class TheaterReport:
    """The ``checks``, and ``correct``: for each attack 0 or 1 for each problem.

    Beside the checks, as (value, low, high): ``within_r``, the correlation of coherence and utility inside problems,
    ``diversity``, the edit distance between the thoughts of a problem, and ``matched_divergence``, their distance from
    a direct continuation of equal length. ``reliability``: of the mixing ``weight``, of the ``vote`` and of
    ``coherence``. ``table``: one row for each thought. ``episodes``: the groups.
    """

    checks: list[Check]
    correct: dict[str, np.ndarray]
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
        """The accuracy under each attack with its interval."""
        return {attack: interval(correct) for attack, correct in self.correct.items()}

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


@torch.no_grad()
def anti_theater(
    model, tokenizer, problems, scale=None, before=None, training=None, think=None, score=coherence, stage="", **given
) -> TheaterReport:
    """Attack a ``QuietStarForCausalLM`` on held-out problems, with the checks at the head of this file.

    ``given``: the settings of ``TheaterSettings``. ``scale``: of coherence. Without the model ``before`` training, or
    the ``training`` questions that were trained or selected on, their checks are not made, and the verdict says so.
    ``think(ids, mask, positions, generator, ...)`` and ``score`` replace the model's sampler and the coherence score,
    which is how some cheats are planted. ``stage`` is the episodes' name of the model. Raises ``WorkbookError`` on
    fewer than 2 problems, ``ParameterError`` on an unknown setting.
    """
    settings, problems = TheaterSettings(**given), list(problems)
    if len(problems) < 2:
        raise WorkbookError("anti-theater needs at least two held-out problems: foreign thoughts come from another one")
    questions = [p["question"] for p in problems]
    contexts = [encode_context(tokenizer, q) for q in questions]
    truth, rng = np.array([p["answer"] for p in problems], object), np.random.default_rng(settings.seed)
    weights, longest, seed = settings.weights, settings.max_new_tokens, settings.seed
    drawing = settings.model_dump(exclude={"n_true", "weights", "max_new_tokens"})
    scoring = {"n_true": settings.n_true, "weights": weights, "think": think, "score": score}
    drawn, rows = score_thoughts(model, tokenizer, problems, scale, **scoring, **drawing)
    own = _stacked(drawn)
    tags, room = tuple(thinking_ids(tokenizer)), max(settings.thought_length, longest)
    direct = replies(model.lm, tokenizer, questions, room, tags, desc="direct")
    endless = replies(
        model.lm, tokenizer, questions, room, (*tags, *end_ids(model.lm, tokenizer)), desc="direct, run on"
    )
    written = {"none": [answer_of(tokenizer, d[:longest]) for d in direct]}
    for attack in tqdm([a for a in ATTACKS if a != "none"], desc="attack", leave=False):
        attacked = attacked_thoughts(attack, *own, problems, tokenizer, rng)
        written[attack] = answers_with(model, tokenizer, contexts, *attacked, weights, longest)
    correct = {attack: (np.array(written[attack], object) == truth).astype(float) for attack in ATTACKS}

    far, matched, diversity = _distances(*own, direct, endless)
    checks = [_above("divergence", far, 0.3)]
    checks += [_gain(name, correct["own"] - correct[attack]) for attack, name in GAIN_OVER.items()]
    if before is not None:
        earlier = _stacked(draw_thoughts(before.think, tokenizer, questions, **drawing))
        was = np.array(answers_with(before, tokenizer, contexts, *earlier, "thoughts", longest), object) == truth
        checks.append(_gain("training_gain", correct["own"] - was))
        checks.append(_above("moved", interval(~_same(earlier, own)), 0, surely=True))
    again = _stacked(draw_thoughts(model.think, tokenizer, questions, **drawing))
    checks.append(_exactly("redrawn", interval(_same(again, own)), 1))
    if training is not None:
        seen = {_plain(q) for q in training}
        checks.append(_exactly("training_overlap", interval([_plain(q) in seen for q in questions]), 0))
    x, y = by_problem(rows, "composite"), by_problem(rows, "utility")
    checks.append(_above("coherence_utility_r", correlation(x, y, seed), 0.5))
    within_r = correlation(x, y.clip(-5, 5), seed, within=True)
    alone = answers_alone(model, tokenizer, contexts, *own, longest)
    reliable = _reliabilities(rows, written["none"], alone, truth, seed)
    table = [{k: r[k] for k in ("problem", "thought", "coherence", "utility", "weight")} for r in rows]
    episodes = as_episodes(tokenizer, problems, drawn, rows, written | {"alone": alone.tolist()}, stage)
    return TheaterReport(checks, correct, within_r, diversity, matched, reliable, table, episodes)


def _stacked(drawn: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``(problems, K, T)`` and lengths ``(problems, K)`` of the thoughts after each question."""
    return torch.cat([t.tokens[:, 0] for t in drawn]), torch.cat([t.lengths[:, 0] for t in drawn])


def _same(drawn, others) -> torch.Tensor:
    """Which of two draws of stacked thoughts are equal, ``(problems, K)``."""
    return ((drawn[0] == others[0]).all(-1) & (drawn[1] == others[1])).cpu()


def _distances(tokens, lengths, direct, endless):
    """Mean normalised distances of thoughts without tags from ``direct``, as much of ``endless``, and each other."""
    distance, drawn = Levenshtein.normalized_distance, zip(tokens.tolist(), lengths.tolist(), strict=True)
    inner = [[t[1 : n - 1] for t, n in zip(*thoughts, strict=True)] for thoughts in drawn]
    far = [[distance(t, d) for t in ts] for ts, d in zip(inner, direct, strict=True)]
    matched = [[distance(t, d[: len(t)]) for t in ts] for ts, d in zip(inner, endless, strict=True)]
    between = [[distance(a, b) for j, a in enumerate(ts) for b in ts[:j]] or [0.0] for ts in inner]
    return interval(far), interval(matched), interval(between)


def _reliabilities(rows, direct: list[str], alone, truth, seed: int) -> dict[str, Reliability]:
    """How well a thought's mixing weight, its vote and its coherence tell whether it alone leads to the truth."""
    shares, right = by_problem(rows, "weight"), alone == truth[:, None]  # (problems, K)
    branches = np.concatenate([by_problem(rows, "no_thought")[:, :1], shares], 1)
    said = np.concatenate([np.array(direct, object)[:, None], alone], 1)
    scores = {"weight": shares, "vote": votes(branches, said), "coherence": by_problem(rows, "composite")}
    return {name: reliability(value, right, seed=seed) for name, value in scores.items()}


def _above(id: str, value, bound: float, surely: bool = False) -> Check:
    mean, low, high = value
    target, reached = f"> {bound:g}", (low if surely else mean) > bound
    target += f", interval above {bound:g}" if surely else ""
    return Check(id, CHECKS[id], target, mean, low, high, reached, not reached and high > bound, MEANINGS[id])


def _gain(id: str, difference: np.ndarray) -> Check:
    mean, low, high = interval(difference)
    if not difference.any():  # differences may still be as frequent as 3 / n (the rule of three, 95 %)
        low, high = -3 / len(difference), 3 / len(difference)
    return _above(id, (mean, low, high), 0, surely=True)


def _exactly(id: str, value, target: float) -> Check:
    return Check(id, CHECKS[id], f"{target:g}", *value, value[0] == target, False, MEANINGS[id])


def _plain(question: str) -> str:
    """A question without differences of case and spacing."""
    return " ".join(question.lower().split())


def fit_scale(model, tokenizer, problems: list[Problem], **settings) -> Scale:
    """Fit the coherence scale to thoughts on validation problems. No labels are read."""
    raw = {}

    def keep(*arguments):
        parts = coherence(*arguments)
        for name, value in parts.raw.items():
            raw.setdefault(name, []).append(value.flatten())
        return parts

    score_thoughts(model, tokenizer, list(problems), None, score=keep, **settings)
    return Scale.fit({k: torch.cat(v) for k, v in raw.items()})
