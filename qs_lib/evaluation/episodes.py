"""Thoughts as records (``episodes.jsonl``): drawn after questions or at any token, scored, and answered with."""

import json
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from ..data.batches import answer_batch
from ..data.tokens import encode_context, padded, thinking_ids
from ..errors import WorkbookError
from ..model import QuietStarForCausalLM
from ..thoughts.generate import Thoughts
from ..thoughts.rescore import rescore_thoughts
from .accuracy import Budget, answer_of, decode_with_thoughts, single_thoughts, sorted_batches
from .coherence import CLIP, coherence, utility

STEPS = ("drawing", "answering with each alone, scoring", "answering without thoughts", "answering with thoughts")
ANSWER_LENGTH = 6  # tokens of an answer to a text of one's own


class Thought(BaseModel):
    """Hold one sampled thought.

    Log-probs are in nats per token (0 for forced tags). ``utility``: gain in log-likelihood of the true continuation,
    None where that is not known. ``coherence``: the label-free scores. ``next_tokens``: the most likely tokens after
    this thought, with their probabilities.
    """

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
    """Hold a text position and the thoughts drawn there.

    ``tokens``: the text read so far, the last one at ``position``. ``base_tokens`` and ``mixed_tokens``: the most
    likely next tokens without thoughts and after mixing. ``answer`` is None where the truth is not known. ``step``: the
    training step after which they were drawn, None outside a training.
    """

    model_config = ConfigDict(extra="forbid")
    problem: int
    question: str
    answer: str | None
    family: str = ""
    difficulty: int = 0
    stage: str = ""
    step: int | None = None
    position: int
    tokens: list[str]
    thoughts: list[Thought]
    no_thought_weight: float = 1.0
    base_tokens: list[tuple[str, float]] = []
    mixed_tokens: list[tuple[str, float]] = []
    answer_without: str = ""
    answer_with: str = ""


def read_episodes(path: str | Path) -> list[Episode]:
    """Return the episodes of a JSON-lines file. Raises ``WorkbookError`` naming the line that does not hold one."""
    episodes = []
    with Path(path).open(encoding="utf-8", newline="\n") as lines:  # splitlines() would also break at U+2028
        for number, line in enumerate(lines, 1):
            try:
                episodes.append(Episode.model_validate(json.loads(line)))  # pydantic's reader refuses lone surrogates
            except (ValueError, RecursionError) as error:
                raise WorkbookError(f"{path}:{number} is not an episode: {str(error).splitlines()[0]}") from None
    return episodes


@torch.no_grad()
def draw_thoughts(think, tokenizer, questions: list[str], seed: int = 0, batch_size: int = 120, **settings) -> list:
    """Draw thoughts after each question: one ``qs_lib.Thoughts`` of one row and position each.

    ``think(ids, mask, positions, generator=, **settings)`` sees questions only: no answer is in reach. Thoughts depend
    on the seed and on the batches, which are cut from the questions in order of length.
    """
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for rows in sorted_batches([len(q) for q in questions], batch_size):
        ids, mask = padded(tokenizer, [encode_context(tokenizer, questions[i]) for i in rows])
        thoughts = think(ids, mask, mask.sum(1, keepdim=True) - 1, generator=generator, **settings)
        drawn |= {i: thoughts.part(torch.tensor([j])) for j, i in enumerate(rows)}
    return [drawn[i] for i in range(len(questions))]


@torch.no_grad()
def score_thoughts(
    model, tokenizer, problems, scale, think=None, score=coherence, weights="head", batch_size=120, room=6, **budget
):
    """Draw and score thoughts after each question: (thoughts per problem, one dict per thought in problem order).

    ``scale``: of coherence, or None. ``think`` and ``score`` replace sampler and coherence score. ``weights``: see
    ``QuietStarForCausalLM.branch_weights``. ``room``: most tokens of an answer. ``budget``: see :class:`Budget`.
    """
    questions = [p["question"] for p in problems]
    settings = vars(Budget(**budget)) | {"batch_size": batch_size}
    drawn, rows = draw_thoughts(think or model.think, tokenizer, questions, **settings), []
    for batch in sorted_batches([len(q) for q in questions], batch_size):
        thoughts = Thoughts.cat([drawn[i] for i in batch])
        ids, mask, _ = answer_batch(tokenizer, [problems[i] for i in batch], thoughts.positions.device)
        found = score_drawn(model, tokenizer, ids, mask, thoughts, scale, None, score, weights, room)
        rows += [row | {"problem": batch[row["problem"]]} for row in found]
    return drawn, sorted(rows, key=lambda r: r["problem"])


def score_drawn(
    model, tokenizer, ids, mask, thoughts, scale=None, n_true=None, score=coherence, weights="head", room=6
) -> list[dict]:
    """Return one dict per thought drawn at one position of each text, ids and mask (B, L).

    ``utility`` is the gain on the next ``n_true`` tokens of the text, None: on all that follow, 0 where it ends there.
    ``written``: at most ``room`` ids that the model writes after the thought alone.
    """
    tags, follow = tuple(thinking_ids(tokenizer)), ids.shape[1] - 1 - thoughts.positions.min().item()
    settings = {"n_true": n_true or max(1, follow), "true_logits": True, "forbid_true": tags}
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, **settings)
    after, base = scored.true_full[..., 0, :], scored.base_full[..., 0, :]  # (B, 1, K, vocab), (B, 1, vocab)
    until = (slice(at + 1) for at in thoughts.positions[:, 0].tolist())
    texts = [row[at][real[at].bool()].tolist() for row, real, at in zip(ids, mask, until, strict=True)]
    written = written_alone(model, tokenizer, texts, thoughts.tokens[:, 0], thoughts.lengths[:, 0], room)
    led = _gains_on(model, tokenizer, texts, thoughts, written)
    parts, gains = score(tokenizer, ids, thoughts, led, scale, mask), utility(scored)
    mixing = model.mixing_weights(scored, weights)[:, 0, 0]  # (B, 1 + K)
    mixed = model.mix(scored.base_hidden[:, 0, 0], scored.thought_hidden[:, 0, :, 0], mixing)
    names, rows = ("semantic", "syntactic", "predictive", "composite"), []
    for b, k in np.ndindex(len(ids), gains.shape[2]):
        row = {"problem": b, "thought": k, "utility": gains[b, 0, k].item(), "weight": mixing[b, k + 1].item()}
        row |= {"no_thought": mixing[b, 0].item(), "coherence": {n: getattr(parts, n)[b, 0, k].item() for n in names}}
        row |= {"written": written[b][k]}
        rows.append(row | {"after": _top(after[b, 0, k]), "base": _top(base[b, 0]), "mixed": _top(mixed[b])})
    return rows


def _top(log_probs: torch.Tensor, n: int = 5) -> list[tuple[int, float]]:
    values, ids = log_probs.topk(n)
    return list(zip(ids.tolist(), values.exp().tolist(), strict=True))


def answers_with(model, tokenizer, contexts, tokens, lengths, weights: str, max_new_tokens: int) -> list[str]:
    """Return the answer to each context (ids) with the thoughts given: tokens (rows, K, T), lengths (rows, K)."""
    written = decode_with_thoughts(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens)
    return [answer_of(tokenizer, w) for w in written]


def written_alone(model, tokenizer, contexts, tokens, lengths, max_new_tokens: int) -> list[list[list[int]]]:
    """Return the ids that the model writes after each thought by itself, a list of K for each context."""
    k = lengths.shape[1]
    repeated, single = [c for c in contexts for _ in range(k)], single_thoughts(tokens, lengths)
    written = decode_with_thoughts(model, tokenizer, repeated, *single, "thoughts", max_new_tokens)
    return [written[i : i + k] for i in range(0, len(written), k)]


def _gains_on(model, tokenizer, texts, thoughts, written) -> torch.Tensor:
    """Return what each thought gains on what was ``written`` after each, (B, 1, K, K). Equal words are scored once."""
    rows, device = {}, thoughts.lengths.device
    which = [[rows.setdefault((b, *words), len(rows)) for words in group] for b, group in enumerate(written)]
    gains, tags, size = [], tuple(thinking_ids(tokenizer)), len(texts)
    for start in range(0, len(rows), size):  # as many rows at once as there are texts
        part = list(rows)[start : start + size]
        ids, mask = padded(tokenizer, [[*texts[b], *words] for b, *words in part], device)
        drawn = thoughts.part([b for b, *_ in part])
        drawn.positions = torch.tensor([[len(texts[b]) - 1] for b, *_ in part], device=device)
        longest = max(1, *(len(row) - 1 for row in part))
        scored = rescore_thoughts(model.lm, ids, drawn, mask, longest, forbid_true=tags)
        gains.append(utility(scored, CLIP)[:, 0])
    return torch.cat(gains)[torch.tensor(which, device=device)].mT.unsqueeze(1)  # (B, words, K) to (B, 1, K, words)


def by_problem(rows: list[dict], key: str) -> np.ndarray:
    """Return one number of each thought, (problems, K): ``utility``, ``weight`` or a part of coherence."""
    return np.array([r["coherence"].get(key, r.get(key)) for r in rows], float).reshape(rows[-1]["problem"] + 1, -1)


def as_episodes(tokenizer, problems, drawn, rows, answers: dict[str, list], stage: str) -> list[Episode]:
    """Return each problem's scored thoughts as a record, with the answers after ``own`` and ``none``."""
    out, k = [], len(rows) // len(problems)
    for i, p in enumerate(problems):
        about = {"problem": i, "stage": stage} | {n: p[n] for n in ("question", "answer", "family", "difficulty")}
        context, given = encode_context(tokenizer, p["question"]), {name: said[i] for name, said in answers.items()}
        out.append(_episode(tokenizer, about, context, drawn[i], rows[i * k : (i + 1) * k], given))
    return out


@torch.no_grad()
def record(
    model, tokenizer, document, thoughts, about, max_new_tokens, weights="head", trained=None, begin=None, **scoring
) -> Episode:
    """Return thoughts (of one row and position) drawn in a text, ``document`` (ids), as an episode.

    They are scored (``scoring``: see :func:`score_drawn`), and answered with in at most ``max_new_tokens`` tokens.
    ``about``: the episode's ``problem``, ``question``, ``answer`` (None where the truth is not known) and other names.
    ``trained``: what training gave each thought, (reward, advantage) of shape (K,) each, where that is not utility and
    utility minus its mean. ``begin(name)`` is called before each of ``STEPS`` but the first.
    """
    at, ids = thoughts.positions.item(), torch.tensor([document], device=thoughts.positions.device)
    context = document[: at + 1]
    given = model, tokenizer, [context], thoughts.tokens[:, 0], thoughts.lengths[:, 0]
    begin = begin or (lambda name: None)
    _, score, without, together = STEPS
    begin(score)
    room = max(max_new_tokens, scoring.get("n_true") or 0)  # coherence looks no less far near the end of a text
    group = score_drawn(model, tokenizer, ids, torch.ones_like(ids), thoughts, weights=weights, room=room, **scoring)
    begin(without)
    said = {"none": answers_with(*given, "none", max_new_tokens)[0]}
    begin(together)
    said["own"] = answers_with(*given, weights, max_new_tokens)[0]
    for row in group:
        row["written"] = row["written"][:max_new_tokens]
    for row, reward, advantage in zip(group, *trained, strict=True) if trained else ():
        row |= {"reward": reward.item(), "advantage": advantage.item()}
    return _episode(tokenizer, about, context, thoughts, group, said)


def _episode(tokenizer, about: dict, context: list[int], thoughts, group: list[dict], answers: dict) -> Episode:
    """Put scored thoughts after one text (ids) and the ``none`` and ``own`` answers into a record."""

    def words(ids):
        return [tokenizer.decode([i]) for i in ids]

    def named(top):
        return [(tokenizer.decode([i]), round(p, 4)) for i, p in top]

    mean, listed = sum(r["utility"] for r in group) / len(group), []
    for j, r in enumerate(group):
        own, gain = (0, 0, j, slice(thoughts.lengths[0, 0, j])), {"utility": None}
        if about["answer"] is not None:  # else the utility means nothing
            gain = {"utility": r["utility"], "reward": r["utility"], "advantage": r["utility"] - mean}
            gain |= {name: r[name] for name in gain if name in r}
        gain |= {"logprobs": [round(x, 4) for x in thoughts.logprobs[own].tolist()]}
        gain |= {"weight": r["weight"], "coherence": r["coherence"], "next_tokens": named(r["after"])}
        drawn = {"tokens": words(thoughts.tokens[own]), "answer": answer_of(tokenizer, r["written"])}
        listed.append(Thought(**drawn, **gain))
    first, read = group[0], {"position": len(context) - 1, "tokens": words(context)}
    known = {"no_thought_weight": first["no_thought"], "answer_without": answers["none"], "answer_with": answers["own"]}
    known |= {"base_tokens": named(first["base"]), "mixed_tokens": named(first["mixed"])}
    return Episode(**about, **read, **known, thoughts=listed)


def text_tokens(tokenizer, text: str) -> list[str]:
    """Return the tokens of a text as the model reads it, in order: what a position counts."""
    return [tokenizer.decode([i]) for i in encode_context(tokenizer, text)]


@torch.no_grad()
def think_at(
    model, tokenizer, text, position=None, answer=None, n_true=4, scale=None, stage="live", progress=None, **budget
) -> Episode:
    """Draw thoughts after token ``position`` (from 0, None: the last) of a text and record all that is known of them.

    The truth is what follows: the whole ``answer`` at the last token, the next ``n_true`` tokens of the text before it.
    Without one the episode's ``answer`` and each ``utility`` are None. ``scale``: of coherence, as the model was judged
    with. ``progress(done, of, what)`` is called before each of ``STEPS`` and at the end. ``budget``: :class:`Budget`.

    Raises ``WorkbookError`` for another kind of model, an empty or too long text and a position outside it.
    """
    budget = Budget(**budget)
    context = checked_context(model, tokenizer, text, position, budget.thought_length + ANSWER_LENGTH)
    last = len(context) - 1 if position is None else position
    at_end, document = last == len(context) - 1, context
    ahead = None if at_end else n_true
    if answer:
        document = answer_batch(tokenizer, [{"question": text, "answer": answer}])[0][0].tolist()
    following = [] if at_end else context[last + 1 : last + 1 + n_true]
    truth, tokens = (answer, ANSWER_LENGTH) if at_end else (answer_of(tokenizer, following), len(following))

    def begin(name):
        if progress is not None:
            progress((*STEPS, "done").index(name), len(STEPS), name)

    begin(STEPS[0])
    ids, at = torch.tensor([context[: last + 1]]), torch.tensor([[last]])
    thoughts = model.think(ids, positions=at, generator=budget.generator(), **budget.drawing)
    about = {"problem": 0, "question": text, "answer": truth or None, "stage": stage}
    made = record(model, tokenizer, document, thoughts, about, tokens, begin=begin, n_true=ahead, scale=scale)
    begin("done")
    return made


def checked_context(model, tokenizer, text, position, room) -> list[int]:
    """Return the ids of a text with ``room`` for so many tokens more. Raises ``WorkbookError`` as ``think_at`` does."""
    if not isinstance(model, QuietStarForCausalLM):
        wrap = "wrap the model with its from_base(model, tokenizer)"
        raise WorkbookError(f"thoughts are drawn by a QuietStarForCausalLM: {wrap}")
    if not text.strip():
        raise WorkbookError("there is no text to think about: write at least one word")
    most = min(tokenizer.model_max_length, getattr(model.config.text_config, "max_position_embeddings", None) or 10**9)
    if len(text) > 100 * most:
        far = f"{len(text):,} characters, far more than the model's {most:,} tokens"
        raise WorkbookError(f"the text has {far}: shorten it")
    context = encode_context(tokenizer, text)
    if len(context) + room > most:
        least = f"thought and answer ({room}) included"
        raise WorkbookError(f"the text has {len(context)} tokens and the model reads {most}, {least}")
    if position is not None and not 0 <= position < len(context):
        raise WorkbookError(f"token {position} is not in the text, whose tokens are 0 to {len(context) - 1}")
    return context
