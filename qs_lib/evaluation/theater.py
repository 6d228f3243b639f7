"""Anti-theater: checks that try to prove the thoughts are for show. Each can fail, and planted cheats make them."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm

from ..data.tokens import encode_context, thinking_ids
from ..errors import WorkbookError
from ..stats import Reliability, correlation, interval, reliability, votes
from .accuracy import answer_of, replies
from .coherence import Scale, coherence
from .episodes import (
    Episode,
    answers_alone,
    answers_with,
    as_episodes,
    by_problem,
    draw_thoughts,
    score_thoughts,
)

ATTACKS = ("own", "none", "foreign", "foreign_family", "shuffled", "filler", "last_step_deleted")
CHECKS = {
    "divergence": ("distance from the direct continuation", "thoughts repeat the direct continuation"),
    "ablation_gain": ("accuracy with own thoughts minus none", "answers are no better with thoughts than without"),
    "foreign_gain": ("accuracy with own thoughts minus foreign", "another problem's thoughts serve as well"),
    "shuffled_gain": ("accuracy with own thoughts minus shuffled", "the thought's words in any order serve as well"),
    "filler_gain": ("accuracy with own thoughts minus filler", "blank filler serves as well"),
    "training_gain": (
        "accuracy with own thoughts minus that of the model before training, same budget",
        "the model before training answers as well with its thoughts",
    ),
    "moved": (
        "share of thoughts that differ from those of the model before training, same seed",
        "training never moved the thoughts",
    ),
    "redrawn": (
        "share of thoughts that come out again from model, question and seed alone",
        "the harness put something into the thoughts",
    ),
    "training_overlap": (
        "share of evaluated questions that were trained or selected on",
        "the problems were seen in training",
    ),
    "coherence_utility_r": (
        "correlation of coherence with utility",
        "coherence does not tell useful thoughts from useless ones",
    ),
}


def attacked_thoughts(attack: str, tokens, lengths, problems, tokenizer, rng):
    """Thoughts (problems, K, T) and lengths (problems, K) as an attack leaves them; tags stay in place.

    ``own`` and ``none`` are left as they are (the caller leaves the thoughts out for ``none``). ``rng``: numpy
    generator that picks other problems and orders.
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
    """For each problem the index of another with a different answer (of the same family where there is one)."""
    out = []
    for i, p in enumerate(problems):
        other = [j for j, q in enumerate(problems) if q["answer"] != p["answer"]]
        kin = [j for j in other if problems[j]["family"] == p["family"]] if same_family else other
        pick = kin or other or [j for j in range(len(problems)) if j != i]
        out.append(int(rng.choice(pick)))
    return torch.tensor(out)


@dataclass
class Check:
    """One test: ``value`` with its 95 % interval over problems against ``target``; ``sentence``: what it would mean if it
    were missed. ``undecided``: missed, but the interval reaches into the target, so that more problems could tell."""

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
    """``checks``: the tests; ``correct``: per attack 0 or 1 for each problem. Beside the checks, as (value, low, high):
    ``within_r``, coherence against utility inside problems; ``diversity``, edit distance between the thoughts of a
    problem; ``matched_divergence``, distance from a direct continuation of equal length. ``reliability`` of the mixing
    ``weight``, of the ``vote`` and of ``coherence``; ``table``: one row per thought; ``episodes``: the groups."""

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
        """Ids of the checks that were not reached."""
        return [c.id for c in self.checks if not c.reached]

    @property
    def accuracy(self) -> dict[str, tuple[float, float, float]]:
        """Accuracy under each attack with its interval."""
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
        """The check of that id. Raises ``KeyError`` where it was not made."""
        return {c.id: c for c in self.checks}[id]

    def to_dict(self) -> dict:
        """Everything but the single problems and thoughts, ready for JSON."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "checks": [asdict(c) for c in self.checks],
            "accuracy": self.accuracy,
            "within_r": self.within_r,
            "diversity": self.diversity,
            "matched_divergence": self.matched_divergence,
            "reliability": {k: asdict(v) for k, v in self.reliability.items()},
        }


@torch.no_grad()
def anti_theater(
    model,
    tokenizer,
    problems: list[dict],
    scale: Scale | None = None,
    num_thoughts: int = 4,
    thought_length: int = 28,
    temperature: float = 1.0,
    n_true: int = 4,
    weights: str = "head",
    seed: int = 0,
    batch_size: int = 120,
    before=None,
    training=None,
    think=None,
    score=coherence,
    stage: str = "",
    max_new_tokens: int = 6,
) -> TheaterReport:
    """Attack a :class:`QuietStarForCausalLM` on held-out problems.

    1. divergence: mean normalised edit distance of a thought from the direct greedy continuation, above 0.3. Beside it
       the same against a continuation of equal length, since a short answer is far from a long thought by length alone.
    2. ablation_gain, foreign_gain, shuffled_gain, filler_gain: accuracy with own thoughts minus accuracy with none, with
       those of another problem, with their own tokens shuffled, with blank filler of the same length: intervals above 0.
    3. training_gain: the same minus the accuracy of the model ``before`` training with its own thoughts, as many, drawn
       alike, all weighted alike: interval above 0. moved: some thoughts differ from those it draws with the same seed.
    4. redrawn: all thoughts come out again, token by token, when the model's own sampler is given the questions alone.
       training_overlap: none of the questions is in ``training``, the questions that were trained or selected on.
    5. coherence_utility_r: Pearson correlation over single thoughts of label-free coherence and utility, above 0.5.

    All intervals are bootstraps over problems. ``weights``: how thoughts are mixed (see ``decode_with_thoughts``).
    Without ``before`` or ``training`` their checks are not made, and the verdict says so.
    ``think(ids, mask, positions, generator, ...)`` and ``score`` replace the model's sampler and the coherence score,
    which is how some cheats are planted. Raises ``WorkbookError`` on fewer than 2 problems.
    """
    problems = list(problems)
    if len(problems) < 2:
        raise WorkbookError("anti-theater needs at least two held-out problems: foreign thoughts come from another one")
    questions = [p["question"] for p in problems]
    contexts = [encode_context(tokenizer, q) for q in questions]
    truth, rng = np.array([p["answer"] for p in problems], object), np.random.default_rng(seed)
    drawing = {
        "num_thoughts": num_thoughts,
        "thought_length": thought_length,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
    }
    drawn, rows = score_thoughts(
        model, tokenizer, problems, scale, n_true=n_true, think=think, score=score, weights=weights, **drawing
    )
    tokens, lengths = _stacked(drawn)
    direct, running_on = _direct(model.lm, tokenizer, questions, max(thought_length, max_new_tokens))

    def answers(with_model, tokens, lengths, weights):
        return answers_with(with_model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens)

    written = {"none": [answer_of(tokenizer, d[:max_new_tokens]) for d in direct]}
    for attack in tqdm(ATTACKS, desc="attack", leave=False):
        if attack != "none":
            given = attacked_thoughts(attack, tokens, lengths, problems, tokenizer, rng)
            written[attack] = answers(model, *given, weights)
    correct = {attack: (np.array(written[attack], object) == truth).astype(float) for attack in ATTACKS}

    far, matched, diversity = _distances(tokens, lengths, direct, running_on)
    checks = [_above("divergence", far, 0.3)]
    for other in ("none", "foreign", "shuffled", "filler"):
        checks.append(_gain("ablation_gain" if other == "none" else f"{other}_gain", correct["own"] - correct[other]))
    if before is not None:
        earlier = _stacked(draw_thoughts(before.think, tokenizer, questions, **drawing))
        was = np.array(answers(before, *earlier, "thoughts"), object) == truth
        checks.append(_gain("training_gain", correct["own"] - was))
        checks.append(_above("moved", interval(~_same(earlier, (tokens, lengths))), 0, surely=True))
    again = _stacked(draw_thoughts(model.think, tokenizer, questions, **drawing))
    checks.append(_exactly("redrawn", interval(_same(again, (tokens, lengths))), 1))
    if training is not None:
        seen = {_plain(q) for q in training}
        checks.append(_exactly("training_overlap", interval([_plain(q) in seen for q in questions]), 0))
    x, y = by_problem(rows, "composite"), by_problem(rows, "utility")
    checks.append(_above("coherence_utility_r", correlation(x, y, seed), 0.5))

    alone = answers_alone(model, tokenizer, contexts, tokens, lengths, max_new_tokens)
    shares, right = by_problem(rows, "weight"), alone == truth[:, None]
    branches = np.concatenate([by_problem(rows, "no_thought")[:, :1], shares], 1)
    said = np.concatenate([np.array(written["none"], object)[:, None], alone], 1)
    scores = {"weight": shares, "vote": votes(branches, said), "coherence": x}
    kept = ("problem", "thought", "coherence", "utility", "weight")
    return TheaterReport(
        checks,
        correct,
        correlation(x, y.clip(-5, 5), seed, within=True),
        diversity,
        matched,
        {name: reliability(value, right, seed=seed) for name, value in scores.items()},
        [{k: r[k] for k in kept} for r in rows],
        as_episodes(tokenizer, problems, drawn, rows, written | {"alone": alone.tolist()}, stage),
    )


def _stacked(drawn: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (problems, K, T) and lengths (problems, K) of the thoughts after each question."""
    return torch.cat([t.tokens[:, 0] for t in drawn]), torch.cat([t.lengths[:, 0] for t in drawn])


def _same(drawn, others) -> torch.Tensor:
    """Which of two draws of stacked thoughts are equal, (problems, K)."""
    return (drawn[0] == others[0]).all(-1) & (drawn[1] == others[1])


def _direct(lm, tokenizer, questions, length):
    """Greedy continuations without thoughts: up to end-of-text, and of full ``length`` with end-of-text forbidden."""
    tags = tuple(thinking_ids(tokenizer))
    return (
        replies(lm, tokenizer, questions, length, tags, desc="direct"),
        replies(lm, tokenizer, questions, length, (*tags, tokenizer.eos_token_id), desc="direct, run on"),
    )


def _distances(tokens, lengths, direct, running_on):
    """Mean normalised edit distance of thoughts, without tags, from the direct continuation, from one of their own
    length, and from each other; each (value, low, high)."""
    distance = Levenshtein.normalized_distance
    inner = [
        [t[1 : n - 1] for t, n in zip(row.tolist(), ends.tolist(), strict=True)]
        for row, ends in zip(tokens, lengths, strict=True)
    ]
    far = [[distance(t, d) for t in ts] for ts, d in zip(inner, direct, strict=True)]
    matched = [[distance(t, d[: len(t)]) for t in ts] for ts, d in zip(inner, running_on, strict=True)]
    between = [[distance(a, b) for j, a in enumerate(ts) for b in ts[:j]] or [0.0] for ts in inner]
    return interval(far), interval(matched), interval(between)


def _plain(question: str) -> str:
    """A question without differences of case and spacing."""
    return " ".join(question.lower().split())


def _above(id: str, value, bound: float, surely: bool = False) -> Check:
    mean, low, high = value
    target, reached = f"> {bound:g}", (low if surely else mean) > bound
    target += f", interval above {bound:g}" if surely else ""
    return Check(id, CHECKS[id][0], target, mean, low, high, reached, not reached and high > bound, CHECKS[id][1])


def _gain(id: str, difference: np.ndarray) -> Check:
    """A difference of accuracies. Where no problem differs, resampling finds an interval of no width; differences may
    still be as frequent as 3 / n (the rule of three, 95 %)."""
    mean, low, high = interval(difference)
    if not difference.any():
        low, high = -3 / len(difference), 3 / len(difference)
    return _above(id, (mean, low, high), 0, surely=True)


def _exactly(id: str, value, target: float) -> Check:
    return Check(id, CHECKS[id][0], f"{target:g}", *value, value[0] == target, False, CHECKS[id][1])


def fit_scale(model, tokenizer, problems: list[dict], **settings) -> Scale:
    """The coherence scale from thoughts on validation problems (no labels are read)."""
    raw = {}

    def keep(*arguments):
        parts = coherence(*arguments)
        for name, value in parts.raw.items():
            raw.setdefault(name, []).append(value.flatten())
        return parts

    score_thoughts(model, tokenizer, list(problems), score=keep, **settings)
    return Scale.fit({k: torch.cat(v) for k, v in raw.items()})
