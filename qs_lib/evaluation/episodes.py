"""Thoughts as records (``episodes.jsonl``): drawn after questions or at any token of a text, scored, and answered with."""

import json
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from ..data.batches import answer_batch
from ..data.tokens import encode_context, pad, thinking_ids
from ..errors import WorkbookError
from ..model import QuietStarForCausalLM
from ..thoughts.rescore import rescore_thoughts
from .accuracy import answer_of, decode_with_thoughts, fixed_weights
from .coherence import coherence, utility

STEPS = ("drawing", "scoring", "answering without thoughts", "answering with thoughts", "answering with each alone")


class Thought(BaseModel):
    """One sampled thought. Log-probs in nats per token (0 for forced tags); ``utility`` is the gain in log-likelihood
    of the true continuation (None where that is not known), ``coherence`` the label-free scores; ``next_tokens`` the
    most likely next tokens after this thought with their probabilities."""

    model_config = ConfigDict(extra="forbid")
    tokens: list[str]
    logprobs: list[float]
    reward: float = 0.0
    advantage: float = 0.0
    utility: float | None = 0.0
    weight: float = 0.0
    coherence: dict[str, float] = {}
    next_tokens: list[tuple[str, float]] = []
    answer: str = ""


class Episode(BaseModel):
    """A text position and the thoughts drawn there. ``tokens`` is the text read so far, the last one at ``position``;
    ``base_tokens`` and ``mixed_tokens`` are the most likely next tokens without thoughts and after mixing. ``answer``
    is None where the truth is not known."""

    model_config = ConfigDict(extra="forbid")
    problem: int
    question: str
    answer: str | None
    family: str = ""
    difficulty: int = 0
    stage: str = ""
    position: int
    tokens: list[str]
    thoughts: list[Thought]
    no_thought_weight: float = 1.0
    base_tokens: list[tuple[str, float]] = []
    mixed_tokens: list[tuple[str, float]] = []
    answer_without: str = ""
    answer_with: str = ""


def read_episodes(path: str | Path) -> list[Episode]:
    """Episodes of a JSON-lines file. Raises ``WorkbookError`` naming the file and line that does not hold one."""
    episodes = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            episodes.append(Episode.model_validate(json.loads(line)))
        except ValueError as error:
            raise WorkbookError(f"{path}:{number} is not an episode: {str(error).splitlines()[0]}") from None
    return episodes


@torch.no_grad()
def draw_thoughts(think, tokenizer, questions: list[str], seed: int = 0, batch_size: int = 120, **settings) -> list:
    """One set of thoughts (``qs_lib.Thoughts`` of one row and position) after each question.

    ``think(ids, mask, positions, generator=, **settings)`` sees questions only: no answer is in reach. Thoughts depend
    on the seed and on the batches, which are cut from the questions in order of length.
    """
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for rows in batches(questions, batch_size):
        texts = [encode_context(tokenizer, questions[i]) for i in rows]
        ids, mask = pad(texts, tokenizer.pad_token_id), pad([[1] * len(t) for t in texts], 0)
        last = torch.tensor([[len(t) - 1] for t in texts])
        thoughts = think(ids, mask, last, generator=generator, **settings)
        drawn |= {i: thoughts.part(torch.tensor([j])) for j, i in enumerate(rows)}
    return [drawn[i] for i in range(len(questions))]


@torch.no_grad()
def score_thoughts(
    model,
    tokenizer,
    problems,
    scale=None,
    num_thoughts=4,
    thought_length=28,
    temperature=1.0,
    n_true=4,
    seed=0,
    batch_size=120,
    think=None,
    score=coherence,
    weights="head",
):
    """Draw and score thoughts after each question: (thoughts per problem, one dict per thought in problem order).

    ``think`` and ``score`` replace the model's sampler and the coherence score; ``weights`` as in
    ``decode_with_thoughts``.
    """
    questions = [p["question"] for p in problems]
    drawn = draw_thoughts(
        think or model.think,
        tokenizer,
        questions,
        seed,
        batch_size,
        num_thoughts=num_thoughts,
        thought_length=thought_length,
        temperature=temperature,
    )
    rows = []
    for batch in batches(questions, batch_size):
        thoughts = together([drawn[i] for i in batch])
        ids, mask, _ = answer_batch(tokenizer, [problems[i] for i in batch], thoughts.positions.device)
        rows += score_drawn(model, tokenizer, ids, mask, thoughts, batch, scale, n_true, score, weights)
    return drawn, sorted(rows, key=lambda r: r["problem"])


def score_drawn(
    model, tokenizer, ids, mask, thoughts, numbers, scale=None, n_true=4, score=coherence, weights="head"
) -> list[dict]:
    """One dict per thought drawn at one position of each text: ids and mask (B, L), ``numbers`` the texts' names.

    ``utility`` is the gain on those of the next ``n_true`` tokens that the text has; 0 where it ends there.
    """
    tags = tuple(thinking_ids(tokenizer))
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=n_true, true_logits=True, forbid_true=tags)
    after, base = scored.true_full[..., 0, :], scored.base_full[..., 0, :]
    parts = score(tokenizer, ids, thoughts, after, base, scale, mask)
    mixing = mixing_weights(model, scored, weights)[..., 0, :]
    return _scored(numbers, parts, utility(scored), mixing, after, base)


def mixing_weights(model, scored, weights: str = "head") -> torch.Tensor:
    """Weight of no thought and of each thought at every true token, (B, P, n_true, 1 + K); ``weights`` as in
    ``decode_with_thoughts``."""
    base, after = scored.base_hidden, scored.thought_hidden.transpose(2, 3)
    given = fixed_weights(weights, after.shape[-2], base.shape[:-1], base.device)
    return model.mixing_head(base, after) if given is None else given


def answers_with(
    model, tokenizer, contexts: list[list[int]], tokens, lengths, weights: str, max_new_tokens: int
) -> list[str]:
    """The answer to each context (ids) with the thoughts given: tokens (rows, K, T), lengths (rows, K)."""
    written = decode_with_thoughts(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens)
    return [answer_of(tokenizer, w) for w in written]


def answers_alone(model, tokenizer, contexts, tokens, lengths, max_new_tokens: int) -> np.ndarray:
    """The answer each thought leads to by itself, (problems, K) of text."""
    k = lengths.shape[1]
    each = answers_with(
        model,
        tokenizer,
        [c for c in contexts for _ in range(k)],
        tokens.flatten(0, 1).unsqueeze(1),
        lengths.view(-1, 1),
        "thoughts",
        max_new_tokens,
    )
    return np.array(each, dtype=object).reshape(-1, k)


def by_problem(rows: list[dict], key: str) -> np.ndarray:
    """One number of each thought as (problems, K): ``utility``, ``weight``, or a part of coherence such as ``composite``."""
    problems = rows[-1]["problem"] + 1
    return np.array([r["coherence"].get(key, r.get(key)) for r in rows], float).reshape(problems, -1)


def batches(questions: list[str], size: int) -> list[list[int]]:
    """Indices of the questions in batches of like length."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def together(thoughts: list):
    """Thoughts of single rows as one batch."""
    first = thoughts[0]
    names = ("tokens", "logprobs", "sampled", "lengths", "positions")
    return first.__class__(
        **{**vars(first), "hidden": None} | {n: torch.cat([getattr(t, n) for t in thoughts]) for n in names}
    )


def _scored(batch, parts, gains, mixing, after, base) -> list[dict]:
    names = ("semantic", "syntactic", "predictive", "composite")
    return [
        {
            "problem": problem,
            "thought": k,
            "utility": gains[b, 0, k].item(),
            "weight": mixing[b, 0, k + 1].item(),
            "no_thought": mixing[b, 0, 0].item(),
            "coherence": {n: getattr(parts, n)[b, 0, k].item() for n in names},
            "after": _top(after[b, 0, k]),
            "base": _top(base[b, 0]),
            "mixed": _top((mixing[b, 0, :, None] * torch.cat([base[b], after[b, 0]]).exp()).sum(0).log()),
        }
        for b, problem in enumerate(batch)
        for k in range(gains.shape[2])
    ]


def _top(log_probs: torch.Tensor, n: int = 5) -> list[tuple[int, float]]:
    values, ids = log_probs.topk(n)
    return list(zip(ids.tolist(), values.exp().tolist(), strict=True))


def episodes(tokenizer, problems, drawn, rows, answers: dict[str, list[str]], stage: str) -> list[Episode]:
    """The scored thoughts of each problem as a record. ``answers``: of the mixture with its ``own`` thoughts and with
    ``none``, and those ``alone`` of each thought."""
    out, k = [], len(rows) // len(problems)
    for i, problem in enumerate(problems):
        out.append(
            Episode(
                problem=i,
                question=problem["question"],
                answer=problem["answer"],
                family=problem["family"],
                difficulty=problem["difficulty"],
                stage=stage,
                answer_without=answers["none"][i],
                answer_with=answers["own"][i],
                **recorded(
                    tokenizer,
                    encode_context(tokenizer, problem["question"]),
                    drawn[i],
                    rows[i * k : (i + 1) * k],
                    answers["alone"][i],
                ),
            )
        )
    return out


@torch.no_grad()
def record(
    model,
    tokenizer,
    document: list[int],
    thoughts,
    problem: dict,
    max_new_tokens: int,
    n_true: int = 4,
    scale=None,
    stage: str = "",
    begin=lambda: None,
    trained=None,
) -> Episode:
    """The thoughts (of one row and position) drawn in a text (ids) as an episode: scored, and answered with.

    ``problem``: its question, its answer (None where the truth is not known) and what else an episode names;
    ``max_new_tokens``: length of an answer; ``begin`` is called before each step. ``trained``: what training gave each
    thought, (reward, advantage) of shape (K,) each, where that is not utility and utility minus its mean.
    """
    begin()
    at, ids = thoughts.positions.item(), torch.tensor([document], device=thoughts.positions.device)
    group = score_drawn(model, tokenizer, ids, torch.ones_like(ids), thoughts, [0], scale, n_true)
    for row, reward, advantage in zip(group, *trained, strict=True) if trained else ():
        row |= {"reward": reward.item(), "advantage": advantage.item()}
    context, drawn, written = document[: at + 1], (thoughts.tokens[:, 0], thoughts.lengths[:, 0]), {}
    for name, weights in (("answer_without", "none"), ("answer_with", "head")):
        begin()
        written[name] = answers_with(model, tokenizer, [context], *drawn, weights, max_new_tokens)[0]
    begin()
    alone = answers_alone(model, tokenizer, [context], *drawn, max_new_tokens)[0]
    known = problem["answer"] is not None
    return Episode(stage=stage, **problem, **written, **recorded(tokenizer, context, thoughts, group, alone, known))


def recorded(tokenizer, context: list[int], thoughts, group: list[dict], alone, known: bool = True) -> dict:
    """What an ``Episode`` holds of the scored thoughts after one text (ids). ``alone``: the answer each leads to;
    ``known``: whether their utility means anything."""

    def named(top):
        return [(tokenizer.decode([i]), round(p, 4)) for i, p in top]

    mean, listed = sum(r["utility"] for r in group) / len(group), []
    for j, r in enumerate(group):
        n = thoughts.lengths[0, 0, j].item()
        gain = {
            "reward": r.get("reward", r["utility"]),
            "advantage": r.get("advantage", r["utility"] - mean),
            "utility": r["utility"],
        }
        listed.append(
            Thought(
                tokens=[tokenizer.decode([t]) for t in thoughts.tokens[0, 0, j, :n].tolist()],
                logprobs=[round(x, 4) for x in thoughts.logprobs[0, 0, j, :n].tolist()],
                weight=r["weight"],
                coherence=r["coherence"],
                next_tokens=named(r["after"]),
                answer=alone[j],
                **(gain if known else {"utility": None}),
            )
        )
    return {
        "position": len(context) - 1,
        "tokens": [tokenizer.decode([t]) for t in context],
        "thoughts": listed,
        "no_thought_weight": group[0]["no_thought"],
        "base_tokens": named(group[0]["base"]),
        "mixed_tokens": named(group[0]["mixed"]),
    }


def text_tokens(tokenizer, text: str) -> list[str]:
    """The tokens of a text as the model reads it, in order: what a position counts."""
    return [tokenizer.decode([i]) for i in encode_context(tokenizer, text)]


@torch.no_grad()
def think_at(
    model,
    tokenizer,
    text: str,
    position: int | None = None,
    answer: str | None = None,
    num_thoughts: int = 4,
    thought_length: int = 28,
    temperature: float = 1.0,
    seed: int = 0,
    n_true: int = 4,
    scale=None,
    max_new_tokens: int = 6,
    stage: str = "live",
    progress=lambda done, of, what: None,
) -> Episode:
    """Draw thoughts after token ``position`` (from 0; None: the last) of a text and record all that is known of them.

    The truth is what follows: at the last token the ``answer``, where one is given, before it the next ``n_true``
    tokens of the text. Without a truth the episode's ``answer`` and each ``utility`` are None. ``scale``: of coherence,
    as the model was judged with; ``progress(done, of, what)`` is called before each step and at the end. Raises
    ``WorkbookError`` for another kind of model, an empty or too long text and a position outside it.
    """
    context = _checked(model, tokenizer, text, position, thought_length + max_new_tokens)
    last = len(context) - 1 if position is None else position
    at_end = last == len(context) - 1
    document = context
    if answer:
        document = answer_batch(tokenizer, [{"question": text, "answer": answer}])[0][0].tolist()
    following = document[last + 1 :] if at_end else context[last + 1 : last + 1 + n_true]
    read, tokens = context[: last + 1], max_new_tokens if at_end else len(following)

    steps = iter(range(len(STEPS)))

    def begin():
        done = next(steps)
        progress(done, len(STEPS), STEPS[done])

    begin()
    thoughts = model.think(
        torch.tensor([read]),
        positions=torch.tensor([[last]]),
        generator=torch.Generator().manual_seed(seed),
        num_thoughts=num_thoughts,
        thought_length=thought_length,
        temperature=temperature,
    )
    truth = answer if at_end else answer_of(tokenizer, following)
    problem = {"problem": 0, "question": text, "answer": truth or None}
    made = record(model, tokenizer, document, thoughts, problem, tokens, n_true, scale, stage, begin)
    progress(len(STEPS), len(STEPS), "done")
    return made


def _checked(model, tokenizer, text, position, room) -> list[int]:
    """The ids of the text, after a look at everything that a user can get wrong."""
    if not isinstance(model, QuietStarForCausalLM):
        raise WorkbookError(
            "thoughts are drawn by a QuietStarForCausalLM: wrap the model with its from_base(model, tokenizer)"
        )
    if not text.strip():
        raise WorkbookError("there is no text to think about: write at least one word")
    most = min(tokenizer.model_max_length, getattr(model.config.text_config, "max_position_embeddings", None) or 10**9)
    if len(text) > 100 * most:
        raise WorkbookError(
            f"the text has {len(text):,} characters, far more than the model's {most:,} tokens: shorten it"
        )
    context = encode_context(tokenizer, text)
    if len(context) + room > most:
        raise WorkbookError(
            f"the text has {len(context)} tokens and the model reads {most}, thought and answer ({room}) included"
        )
    if position is not None and not 0 <= position < len(context):
        raise WorkbookError(f"token {position} is not in the text, whose tokens are 0 to {len(context) - 1}")
    return context
