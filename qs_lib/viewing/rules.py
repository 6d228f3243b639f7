"""The rules of the training doctor: what healthy and sick trainings look like in their metrics.

A rule takes a :class:`Course` and returns its verdict, "healthy", "look", "sick" or "unknown", what it found, and the
next step, which is told with "look" and "sick". Its docstring is its documentation: threshold and reason. Where one
disease explains another, only the cause is named. A leak into training and validation alike is not in the files.
"""

from typing import NamedTuple

import numpy as np

from ..evaluation.episodes import Episode

LEAST = 10  # rows below which no trend is told from noise
WARM_UP = 20  # steps in which learning rates rise; a curriculum's first problems are solved by all thoughts
SETTLED = 50  # rows before which curriculum, warm-up and the gate's opening look like diseases
WORSE = ("healthy", "look", "sick")  # verdicts in order
GROUPS = 8  # recorded groups below which their shares say nothing


class Course(NamedTuple):
    """A training as the rules see it. ``copied``: share of validation questions that are training questions."""

    rows: list[dict]
    episodes: list[Episode] = []
    copied: float | None = None

    def values(self, name: str, rows=None) -> np.ndarray:
        """Return a metric's finite numbers in the order of the rows."""
        found = [row.get(name) for row in (self.rows if rows is None else rows)]
        return np.array([x for x in found if finite(x)], float)

    def ends(self, name: str, rows=None) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the first and last tenth of a metric's numbers, at least five each, or None if there are too few."""
        x = self.values(name, rows)
        n = max(5, len(x) // 10)
        return (x[:n], x[-n:]) if len(x) >= LEAST else None

    def late(self, name: str) -> float | None:
        """Return the median of the last tenth: one wild step does not move it."""
        ends = self.ends(name)
        return None if ends is None else float(np.median(ends[1]))

    def validated(self) -> list[int]:
        """Return which rows hold a held-out accuracy."""
        return [i for i, row in enumerate(self.rows) if finite(row.get("validation_accuracy"))]

    def since_best(self) -> tuple[float, float, list[dict]] | None:
        """Return (best, last) held-out accuracy and the rows from the best on. None before the second validation."""
        at, scores = self.validated(), self.values("validation_accuracy")
        if len(scores) < 2:
            return None
        best = int(scores.argmax())
        return float(scores[best]), float(scores[-1]), self.rows[max(0, at[best] - 4) :]


def finite(x) -> bool:
    """Say whether it is a number that can be reckoned with. JSON may hold NaN, infinity and numbers whose square is not one."""
    return type(x) in (int, float) and abs(x) < 1e100


def graded(value: float, look: float, sick: float) -> str:
    """Return the verdict of a number of which more is worse."""
    return "sick" if value >= sick else "look" if value >= look else "healthy"


def missing(name: str) -> tuple[str, str]:
    """Return what a rule says where its metrics are not there, or in too few rows."""
    return "unknown", f"it takes {LEAST} rows or more with {name}"


def dead_groups(c: Course) -> tuple[str, ...]:
    """Find groups whose rewards are all equal: look from 75 %, sick from 90 %.

    They train nothing. Noise of the gradient grows by the root of the share left: by 2 at 75 %, by 3 at 90 %. The
    pocket run gains nine points with up to 68 %.
    """
    tied, right = c.late("tied"), c.late("correct")
    if len(c.rows) < WARM_UP or tied is None:
        return "unknown", f"it takes {WARM_UP} rows with tied"
    verdict = graded(tied, 0.75, 0.9)
    if verdict != "healthy" and thoughts_ignored(c)[0] == "sick":
        return "unknown", "rewards are equal because thoughts change nothing"
    easy = right is None or right >= 0.5
    step = "harder problems (lower pass_high)" if easy else "easier problems (raise pass_low)"
    return verdict, f"{tied:.0%} of the groups have no spread in reward", f"raise temperature or choose {step}"


def difficulty(c: Course) -> tuple[str, ...]:
    """Find problems that nearly all thoughts solve, or none: look if 95 % or 5 % are right, sick below 1 %.

    At 95 % four thoughts are all right in 81 % of the groups, so recorded groups count from 80 % in all or none.
    Solved problems are no illness, unsolved ones leave nothing to reinforce.
    """
    groups = [[t.answer == e.answer for t in e.thoughts] for e in c.episodes if e.answer and e.thoughts][-32:]
    right = c.late("correct")
    if right is None and len(groups) < GROUPS:
        return missing("correct")
    if dead_groups(c)[0] in ("look", "sick"):
        return "unknown", "it is told with the groups without spread"
    every, none = (float(np.mean([f(g) for g in groups])) if groups else 0.0 for f in (all, lambda g: not any(g)))
    parts = [] if right is None else [f"{right:.0%} of the thoughts are right"]
    if groups:
        parts.append(f"in {every:.0%} of {len(groups)} recorded groups all thoughts are right, in {none:.0%} none")
    told = ", ".join(parts)
    recorded = len(groups) >= GROUPS and every + none >= 0.8
    if right is not None and right <= 0.05 or recorded and none > every:
        hopeless = right < 0.01 if right is not None else none >= 0.95
        return "sick" if hopeless else "look", told, "choose easier problems (raise pass_low) or bake longer"
    if right is not None and right >= 0.95 or recorded:
        return "look", told, "choose harder problems (lower pass_high), or stop if these were the goal"
    return "healthy", told


def reward_hacking(c: Course) -> tuple[str, ...]:
    """Find reward that rises while held-out accuracy falls below its best: look from 0.05, sick from 0.1.

    A share of 480 problems has a standard error of 0.023 at most, so 0.05 is two. Of fewer problems it says more than
    it knows. Reward rises if its last tenth is two standard errors above the time of the best validation.
    """
    if (since := c.since_best()) is None:
        return "unknown", "it takes two validations with validation_accuracy"
    best, last, rows = since
    told = f"held-out accuracy is {last:.3f}, its best {best:.3f}"
    first, end = c.ends("reward", rows) or (np.zeros(2), np.zeros(2))
    error = np.sqrt(first.var(ddof=1) / len(first) + end.var(ddof=1) / len(end))
    grown = float(end.mean() - first.mean())
    if best - last < 0.05 or grown <= 2 * error:
        return "healthy", f"{told}, and reward does not rise against it"
    length = c.ends("length", rows)
    longer = length is not None and length[1].mean() > 1.5 * length[0].mean()
    grew = f" and thoughts grew from {length[0].mean():.0f} to {length[1].mean():.0f} tokens" if longer else ""
    advice = "lower thought_length" if longer else "raise kl_coefficient"
    told = f"reward rose by {grown:.2g}{grew} while {told}"
    return graded(best - last, 0.05, 0.1), told, f"keep the best weights, {advice}, or mend the reward"


def length(c: Course) -> tuple[str, ...]:
    """Find thoughts that grow or shrink by 1.5 (look) or 2 (sick) while held-out accuracy does not rise by 0.02.

    Twice the tokens is twice the time for nothing, half of them is thinking given up. Both are taken from the first
    validation on: before it a curriculum lengthens thoughts (the pocket run's from 11 to 21 tokens).
    """
    at, scores = c.validated(), c.values("validation_accuracy")
    ends = c.ends("length", c.rows[max(0, at[0] - 4) :] if at else [])
    if ends is None or len(scores) < 2:
        return "unknown", f"it takes two validations with validation_accuracy and {LEAST} rows with length between"
    first, last = (float(x.mean()) for x in ends)
    ratio = max(first, last) / max(1e-9, min(first, last))
    told, gain = f"thoughts went from {first:.0f} to {last:.0f} tokens", float(scores[-1] - scores[0])
    verdict = graded(ratio, 1.5, 2)
    if verdict == "healthy" or gain >= 0.02:
        return "healthy", told
    if reward_hacking(c)[0] in ("look", "sick"):
        return "unknown", "it is told with the reward"
    advice = "lower thought_length" if last > first else "raise nll_weight or lower the learning rates"
    return verdict, f"{told} while held-out accuracy changed by {gain:+.3f}", advice


def entropy(c: Course) -> tuple[str, ...]:
    """Find entropy that fell to a fifth of its start (look) or a tenth (sick).

    Its level says little: the baked pocket model starts at 0.03 nats per token and learns. Below a tenth thoughts are
    near copies, so advantages vanish and nothing new is tried.
    """
    if (ends := c.ends("entropy")) is None:
        return missing("entropy")
    first, last = (float(x.mean()) for x in ends)
    verdict = graded(first / max(1e-12, last), 5, 10) if first > 0 else "healthy"
    told = f"entropy of thoughts went from {first:.2g} to {last:.2g} nats per token"
    return verdict, told, "raise temperature or kl_coefficient, or lower the learning rates"


def gate(c: Course) -> tuple[str, ...]:
    """Find a weight of no thought that stays: look from 0.9, sick from 0.97, after 50 steps.

    It starts at 1 by construction, and the pocket run is at 0.17 by step 50. At 0.97 thoughts give 3 % of a prediction.
    """
    weight, n = c.late("no_thought_weight"), len(c.values("no_thought_weight"))
    if weight is None or n < SETTLED:
        return "unknown", f"the gate starts shut, it takes {SETTLED} rows with no_thought_weight"
    told = f"the prediction without thoughts has weight {weight:.2f} after {n} steps"
    return graded(weight, 0.9, 0.97), told, "the gate is shut, raise head_lr or nll_weight"


def thoughts_ignored(c: Course) -> tuple[str, ...]:
    """Find thoughts that change nothing: sick if none gains or loses 0.02 nats although answers are wrong.

    A gain of 0.02 nats changes a probability by 2 %. Of recorded thoughts it is seen directly. Of ``reward`` it is seen
    if that is a gain in nats: it is 0 while ``correct`` is not, and ``signal`` is below 5 %.
    """
    kept = [t for e in c.episodes[-32:] for t in e.thoughts if e.answer and t.utility is not None]
    rows, right, signal = c.ends("reward"), c.late("correct"), c.late("signal")
    advice = "raise thought_nll_weight, which teaches to read on behind a thought, or bake longer"
    if len(kept) >= 4 * GROUPS:
        most = max(abs(t.utility) for t in kept)
        wrong = any(t.answer != e.answer for e in c.episodes[-32:] for t in e.thoughts if e.answer)
        told = f"the largest gain or loss of {len(kept)} recorded thoughts is {most:.2g} nats"
        return "sick" if most < 0.02 and wrong else "healthy", told, advice
    if rows is None or right is None or signal is None:
        return missing("reward, correct and signal")
    most = float(np.abs(rows[1]).max())
    told = f"mean rewards of the last steps reach {most:.2g}"
    if most < 0.02 and signal < 0.05 and 0.05 < right < 0.95:
        return "sick", f"{told} nats although {right:.0%} are right, so thoughts change nothing", advice
    return "healthy", told


def kl(c: Course) -> tuple[str, ...]:
    """Find drift from the reference: look from 0.5 nats per token of a thought, sick from 1; without, from 0.1 and 0.5.

    At 1 nat the reference finds each token e times less likely, and the pocket run ends at 0.09. What is said without
    thoughts (``base_kl``) was to stay: it ends at 0.02. Medians are taken, because the estimate has a heavy tail.
    """
    drift, tokens, base = c.late("kl"), c.late("length"), c.late("base_kl")
    if drift is None or tokens is None:
        return missing("kl and length")
    if rate(c)[0] == "sick":
        return "unknown", "it is told with the learning rate"
    each, base = drift / max(1, tokens), base or 0.0
    told = f"thoughts are {each:.2g} nats per token from the reference, predictions without them {base:.2g}"
    verdicts = graded(each, 0.5, 1), graded(base, 0.1, 0.5)
    verdict = max(verdicts, key=WORSE.index)
    raised = "kl_coefficient" if verdicts[0] == verdict else "base_kl"
    return verdict, told, f"raise {raised}, or lower the learning rates"


def rate(c: Course) -> tuple[str, ...]:
    """Find a learning rate that is too high: a loss that is not finite, or is at the end 5 times what it was before.

    Or held-out accuracy that fell by 0.1 (look) or 0.2 (sick) below its best while reward did not rise. The loss must
    have grown by 1 as well, and be told of 50 rows: a curriculum raises it at first.
    """
    losses = [row["loss"] for row in c.rows if type(row.get("loss")) in (int, float)]
    if len(losses) < LEAST:
        return missing("loss")
    advice = "lower the learning rates (muon_lr, adamw_lr) to a third"
    if broken := sum(not finite(x) for x in losses):
        return "sick", f"{broken} losses are not finite", advice
    n = max(5, len(losses) // 10)
    before, last = (float(np.median(np.abs(x))) for x in (losses[:-n], losses[-n:]))
    told = f"the loss is {last:.2g}, it was {before:.2g}"
    if len(losses) >= SETTLED and last >= 5 * before and last - before >= 1:
        return "sick", told, advice
    since = c.since_best()
    if since and reward_hacking(c)[0] == "healthy":
        verdict = graded(since[0] - since[1], 0.1, 0.2)
        if verdict != "healthy":
            return verdict, f"held-out accuracy fell from {since[0]:.3f} to {since[1]:.3f} and {told}", advice
    return "healthy", told


def gradients(c: Course) -> tuple[str, ...]:
    """Find gradients that are 0 (sick), or end 10 (look) or 100 times (sick) above their median before.

    Norms are those before clipping, which keeps a wild step small, not a noisy one. A part with gradient 0 learns nothing.
    """
    names = sorted({name for row in c.rows for name in row if name.startswith("gradient_")})
    parts = {name: c.values(name) for name in names if c.ends(name)}
    told, verdicts, sick_rate = [], [], rate(c)[0] == "sick"
    for name, x in parts.items():
        n = min(max(10, len(x) // 10), len(x) // 2)  # a few wild steps in a row are no end: the pocket run has five
        before, last = float(np.median(x[:-n])), float(np.median(x[-n:]))
        told.append(f"{last:.2g} for the {name.removeprefix('gradient_')} (before {before:.2g})")
        grown = last / max(1e-12, before) if len(x) >= SETTLED and not sick_rate else 1.0
        verdicts.append("sick" if last == 0 else graded(grown, 10, 100))
    if not told:
        return missing("gradient_model")
    without = any(c.late(name) == 0 for name in parts)
    advice = "a part without one is frozen, or not in the loss" if without else "lower the learning rates"
    return max(verdicts, key=WORSE.index), f"gradient norms end at {', '.join(told)}", advice


def pace(c: Course) -> tuple[str, ...]:
    """Tell what a minute of training gained in held-out accuracy, first to last validation. It is never an illness."""
    at, scores, seconds = c.validated(), c.values("validation_accuracy"), c.values("seconds")
    if len(at) < 2 or len(seconds) < len(c.rows):
        return "unknown", "it takes two validations with validation_accuracy, and seconds in every row"
    minutes = float(seconds[at[0] + 1 : at[-1] + 1].sum()) / 60
    gained = 100 * float(scores[-1] - scores[0])
    told = f"{gained:+.1f} points of held-out accuracy in {minutes:.1f} minutes, {gained / max(1e-9, minutes):+.2g} a minute"
    return "healthy", told


def leaking_validation(c: Course) -> tuple[str, ...]:
    """Find a validation that is too good: look 0.35 above ``correct`` at every validation, sick if questions are copies.

    Accuracy pools several thoughts and training takes disputed problems first: the pocket run is 0.13 to 0.21 above.
    Metrics alone do not prove a leak, and a validation before training, which would tell more, is not among them.
    """
    if c.copied:
        return "sick", f"{c.copied:.1%} of the validation questions are training questions", "split the data anew"
    gaps, start = [], 0
    for i in c.validated():
        right, start = c.values("correct", c.rows[start : i + 1]), i + 1
        if len(right):
            gaps.append(c.rows[i]["validation_accuracy"] - float(right.mean()))
    if not gaps:
        return "unknown", "it takes a validation_accuracy and correct"
    known = "no question is copied to the letter" if c.copied == 0 else "the questions were not compared"
    told = f"held-out accuracy is {min(gaps):+.2f} or more from that of training, {known}"
    return "look" if min(gaps) >= 0.35 else "healthy", told, "compare the splits for near copies"


def learning(c: Course) -> tuple[str, ...]:
    """Find a loss that does not fall: look if it ends above 0.9 of its start, sick if it ends above it."""
    if (ends := c.ends("loss")) is None:
        return missing("loss")
    if rate(c)[0] == "sick":
        return "unknown", "it is told with the learning rate"
    first, last = (float(np.median(x)) for x in ends)
    told = f"the loss went from {first:.2g} to {last:.2g}"
    return graded(last / max(1e-9, first), 0.9, 1), told, "raise the learning rates, or train longer"


def thinking(c: Course) -> tuple[str, ...]:
    """Find baking that does not take: less than 80 % of the replies think (look) or half (sick).

    Reinforcement after it draws thoughts from this habit. Also look where accuracy fell by 0.05 below an earlier epoch.
    """
    use, accuracy = c.values("thinking_use"), c.values("accuracy")
    if not len(use):
        return "unknown", "it takes an epoch with thinking_use"
    told, verdict = f"{use[-1]:.0%} of the replies think", graded(1 - use[-1], 0.2, 0.5)
    if verdict != "healthy":
        return verdict, told, "bake more epochs or give more worked examples"
    if len(accuracy) and accuracy.max() - accuracy[-1] >= 0.05:
        return "look", f"{told}, but accuracy fell from {accuracy.max():.3f} to {accuracy[-1]:.3f}", "bake fewer epochs"
    return verdict, told


def attention_logits(c: Course) -> tuple[str, ...]:
    """Find attention logits that explode: look from 50, sick from 100, the bound of Kimi K2's QK-Clip."""
    if not len(largest := c.values("max_logit")):
        return "unknown", "it takes a validation or an epoch with max_logit"
    told = f"the largest attention logit is {largest[-1]:.3g}"
    return graded(largest[-1], 50, 100), told, "set qk_clip_threshold=100, or lower muon_lr"


REINFORCEMENT_RULES = (dead_groups, difficulty, reward_hacking, length, entropy, gate, thoughts_ignored, kl, rate)
REINFORCEMENT_RULES += (gradients, leaking_validation, attention_logits, pace)
BAKING_RULES = (learning, rate, gradients, thinking, attention_logits)
PRETRAINING_RULES = (learning, rate)
