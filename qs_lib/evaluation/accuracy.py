"""Exact match of written replies, with thoughts and without, measured by the same procedure each time."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from ..data.batches import answer_batch
from ..data.strategies import reply, strategy_of
from ..data.tokens import encode, encode_context, line_ends, mark, marker_spellings, pad, thinking_ids
from ..model import ThinkingCache
from ..stats import interval
from ..thoughts.rescore import rescore_thoughts

TEMPERATURES = (0.0, 0.5, 0.7, 1.0)


def habits(model, tokenizer, problems: list[dict], max_new_tokens: int = 48) -> dict:
    """Greedy replies' exact-match ``accuracy``, ``thinking_use`` (share that think) and ``strategy_fit`` (share whose
    strategy suits the problem)."""
    start, end = thinking_ids(tokenizer)[:2]
    spellings = marker_spellings(tokenizer)
    contexts = [p["question"] for p in problems]
    correct, use, fit = [], [], []
    for problem, written in zip(problems, replies(model, tokenizer, contexts, max_new_tokens), strict=True):
        ids, _ = mark(written, spellings)
        thought = tokenizer.decode(ids[: ids.index(end)]) if end in ids else ""
        correct.append(answer_of(tokenizer, ids, (end,)) == problem["answer"])
        use.append(bool(ids) and ids[0] == start and end in ids)
        fit.append(use[-1] and strategy_of(thought) in (problem["fits"] or ["cot"]))
    n = len(problems)
    return {"accuracy": sum(correct) / n, "thinking_use": sum(use) / n, "strategy_fit": sum(fit) / n}


@torch.no_grad()
def replies(
    model,
    tokenizer,
    contexts: list[str],
    max_new_tokens: int = 48,
    forbid: tuple[int, ...] = (),
    temperature: float = 0.0,
    batch_size: int = 240,
    seed: int = 0,
    desc: str = "reply",
) -> list[list[int]]:
    """Reply ids of a plain causal LM for each context, greedy or sampled: one line, without its end or end-of-text.

    ``forbid``: ids that may not be written (the eight thinking tokens, to answer without thoughts).
    """
    torch.manual_seed(seed)
    ends = [tokenizer.eos_token_id, *line_ends(tokenizer)]
    stops = set(ends)
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    encoded, out = [encode_context(tokenizer, c) for c in contexts], [None] * len(contexts)
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(list(forbid))] if forbid else [])
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    for i in tqdm(range(0, len(order), batch_size), desc=desc, leave=False):
        rows = order[i : i + batch_size]
        ids = pad([encoded[k] for k in rows], tokenizer.pad_token_id, "left", model.device)
        mask = pad([[1] * len(encoded[k]) for k in rows], 0, "left", model.device)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            logits_processor=processors,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            **sampling,
        )[:, ids.shape[1] :]
        for k, row in zip(rows, written.tolist(), strict=True):
            out[k] = list(itertools.takewhile(lambda i: i not in stops, row))
    return out


def answer_of(tokenizer, reply: list[int], end_of_thought: tuple[int, ...] = ()) -> str:
    """The answer a reply gives: its text after the last end-of-thought id, without the closing stop."""
    for end in end_of_thought:
        if end in reply:
            reply = reply[len(reply) - reply[::-1].index(end) :]
    return tokenizer.decode(reply, skip_special_tokens=False).strip().removesuffix(".").strip()


@torch.no_grad()
def decode_with_thoughts(
    model,
    tokenizer,
    contexts: list[list[int]],
    tokens,
    lengths,
    weights: str = "head",
    max_new_tokens: int = 4,
    max_streams: int = 320,
) -> list[list[int]]:
    """Greedy replies (ids, without end-of-text) of a :class:`QuietStarForCausalLM` to contexts (ids) with given thoughts.

    ``tokens`` (rows, K, T) and ``lengths`` (rows, K), any thoughts at all: own, foreign, shuffled. ``weights``:
    ``"head"`` (the mixing head), ``"thoughts"`` (every thought alike, no vote for the plain prediction), ``"none"`` (the
    plain prediction alone). ``max_streams``:
    texts with a thought that are read together, rows of like length first.
    """
    whole = [len(c) + longest for c, longest in zip(contexts, lengths.amax(1).tolist(), strict=True)]
    order = sorted(range(len(contexts)), key=whole.__getitem__)
    out, size = [None] * len(contexts), max(1, max_streams // (1 + tokens.shape[1]))
    for i in tqdm(range(0, len(order), size), desc="answer", leave=False, delay=2):
        rows = order[i : i + size]
        replies = _decode(
            model, tokenizer, [contexts[r] for r in rows], tokens[rows], lengths[rows], weights, max_new_tokens
        )
        for row, written in zip(rows, replies, strict=True):
            out[row] = written
    return out


def _decode(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens) -> list[list[int]]:
    ids = pad(contexts, tokenizer.pad_token_id, "left", model.device)
    mask = pad([[1] * len(c) for c in contexts], 0, "left", model.device)
    cache = ThinkingCache(ids, mask)
    cache.restart(tokens, lengths, tokenizer.pad_token_id)
    k = tokens.shape[1]
    given = fixed_weights(weights, k, (len(contexts),), model.device)
    out, open_rows = [[] for _ in contexts], set(range(len(contexts)))
    for _ in range(max_new_tokens):
        hidden = model._read(model.lm, cache.stream_ids, cache.stream_mask, cache=cache.streams)[:, -1]
        hidden = hidden.unflatten(0, (len(contexts), -1))
        chosen = model.mix(hidden[:, 0], hidden[:, 1:], given).argmax(-1)
        for row in list(open_rows):
            if chosen[row] == tokenizer.eos_token_id:
                open_rows.remove(row)
            else:
                out[row].append(chosen[row].item())
        if not open_rows:
            break
        cache.append(chosen[:, None])
    return out


def fixed_weights(weights: str, k: int, rows: tuple[int, ...], device=None) -> torch.Tensor | None:
    """What ``weights`` of :func:`decode_with_thoughts` gives no thought and each of ``k`` thoughts, alike in all rows,
    (*rows, 1 + k); None for ``"head"``."""
    fixed = {"thoughts": [0.0] + k * [1 / k], "none": [1.0] + k * [0.0]}
    return torch.tensor(fixed[weights], device=device).expand(*rows, -1) if weights in fixed else None


@torch.no_grad()
def writes_truth(model, ids, mask, thoughts, weights: str = "head", max_new_tokens: int = 6, max_streams: int = 320):
    """Whether greedy decoding would write just what follows the thoughts in their texts: with all thoughts of a text together
    (B,), and with each alone (B, K). ``thoughts``: one position a text, ids and mask (B, L); ``weights`` as in
    :func:`decode_with_thoughts`. False where that is longer than ``max_new_tokens`` and its end-of-text.

    The true reply is to greedy decoding what a draft is to speculative decoding (Leviathan et al., arXiv 2211.17192): where every
    token of it is the likeliest, it is what would be written, and one pass that reads each text once has found that.
    """
    k, parts = thoughts.tokens.shape[2], []
    size = max(1, max_streams // (1 + k))
    last = mask.sum(1) - 1 - thoughts.positions[:, 0]  # tokens after the thoughts
    for part in (slice(i, i + size) for i in range(0, len(ids), size)):
        ahead = int(last[part].clamp(max=max_new_tokens + 1).max())
        scored = rescore_thoughts(
            model.lm, ids[part], thoughts.part(part), mask[part], ahead, forbid_true=model.config.hidden_ids
        )
        together = torch.ones(len(ids[part]), dtype=torch.bool, device=ids.device)
        alone, given = together[:, None].repeat(1, k), fixed_weights(weights, k, together.shape, ids.device)
        for step in range(ahead):  # one token at a time: K predictions over a large vocabulary are many numbers
            there = scored.valid[:, 0, step]
            at = (thoughts.positions[part] + 1 + step).clamp(max=ids.shape[1] - 1)
            true, after = ids[part].gather(1, at), scored.thought_hidden[:, 0, :, step]
            mixed = model.mix(scored.base_hidden[:, 0, step], after, given)
            together &= (mixed.argmax(-1) == true[:, 0]) | ~there
            alone &= (model.visible_log_probs(after).argmax(-1) == true) | ~there[:, None]
        short = last[part] <= max_new_tokens + 1
        parts.append((together & short, alone & short[:, None]))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


@torch.no_grad()
def accuracy_with_thoughts(
    model,
    tokenizer,
    problems: list[dict],
    num_thoughts: int = 4,
    thought_length: int = 28,
    temperature: float = 1.0,
    weights: str = "head",
    seed: int = 0,
    batch_size: int = 240,
    single: bool = False,
    max_new_tokens: int = 6,
) -> dict:
    """Exact match of greedily decoded replies with thoughts after the question, floats 0 or 1: ``mixed`` (problems,), and with
    ``single`` also ``each`` (problems, K), every thought answering alone. ``thoughts``: theirs, decoded without tags, K per problem."""
    generator = torch.Generator().manual_seed(seed)
    mixed, each, texts = torch.zeros(len(problems)), torch.zeros(len(problems), num_thoughts), [None] * len(problems)
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["question"]))
    for i in range(0, len(order), batch_size):
        rows = order[i : i + batch_size]
        asked = [problems[r] for r in rows]
        ids, mask, last = answer_batch(tokenizer, asked, model.device)
        thoughts = model.think(
            ids,
            mask,
            last,
            generator,
            num_thoughts=num_thoughts,
            thought_length=thought_length,
            temperature=temperature,
            with_hidden=False,
        )
        tokens, lengths = thoughts.tokens[:, 0], thoughts.lengths[:, 0]
        together, alone = writes_truth(model, ids, mask, thoughts, weights, max_new_tokens)
        mixed[rows] = _right(model, tokenizer, asked, tokens, lengths, together, weights, max_new_tokens)
        if single:
            each[rows] = _right(
                model,
                tokenizer,
                [p for p in asked for _ in range(num_thoughts)],
                tokens.flatten(0, 1).unsqueeze(1),
                lengths.view(-1, 1),
                alone.flatten(),
                "thoughts",
                max_new_tokens,
            ).view(len(rows), -1)
        for r, drawn, ends in zip(rows, tokens, lengths, strict=True):
            texts[r] = [tokenizer.decode(t[1 : n - 1]) for t, n in zip(drawn, ends, strict=True)]
    return {"mixed": mixed, "thoughts": texts} | ({"each": each} if single else {})


def _right(model, tokenizer, problems, tokens, lengths, settled, weights, max_new_tokens) -> torch.Tensor:
    """1 where the reply is known to be the true one or, written out, gives its answer in other words; else 0."""
    left, right = (~settled).nonzero().squeeze(1), settled.float().cpu()
    asked = [problems[row] for row in left.tolist()]
    contexts = [encode_context(tokenizer, p["question"]) for p in asked]
    written = decode_with_thoughts(model, tokenizer, contexts, tokens[left], lengths[left], weights, max_new_tokens)
    right[left.cpu()] = torch.tensor(
        [float(answer_of(tokenizer, w) == p["answer"]) for w, p in zip(written, asked, strict=True)]
    )
    return right


def best_temperature(model, tokenizer, validation: list[dict], temperatures=(0.0, 0.5, 0.7, 1.0), **settings) -> dict:
    """The sampling temperature with the best mixed accuracy on validation problems (0 = greedy thoughts; of equals the
    highest, so that thoughts differ), and all of them: ``{"temperature", "accuracy", "by_temperature"}``. ``settings``
    go to :func:`accuracy_with_thoughts`."""
    by = {
        t: accuracy_with_thoughts(model, tokenizer, validation, temperature=t, **settings)["mixed"].mean().item()
        for t in temperatures
    }
    best = max(by, key=lambda t: (by[t], t))
    return {"temperature": best, "accuracy": by[best], "by_temperature": by}


@dataclass
class Performance:
    """Exact match on test problems, arrays of 0 and 1, one row per problem.

    ``mixed``: ``num_thoughts`` thoughts answer together at ``temperature`` (the best on validation; all of them in
    ``by_temperature``); ``single`` (problems, K): each of these thoughts answers alone; ``greedy``: one greedy thought;
    ``without``: no thought, thinking tokens forbidden. ``thoughts``: decoded, per problem; ``thought_fit``: share of
    them whose strategy suits the problem; ``habits``: of the model's own free greedy replies.
    """

    temperature: float
    by_temperature: dict[float, float]
    mixed: np.ndarray
    single: np.ndarray
    greedy: np.ndarray
    without: np.ndarray
    thoughts: list[list[str]] = field(repr=False)
    thought_fit: float
    habits: dict[str, float]

    def share(self, name: str) -> tuple[float, float, float]:
        """Accuracy of ``mixed``, ``single``, ``greedy`` or ``without`` with its 95 % interval over problems."""
        return interval(getattr(self, name))


def read_problems(path: str | Path) -> list[dict]:
    """Records of a parquet file that notebook 02 wrote."""
    return pq.read_table(path).to_pylist()


def longest_answer(tokenizer, problems: list[dict]) -> int:
    """Tokens to allow for an answer: those of the longest true one, and its closing stop."""
    sequences = (encode(tokenizer, p["question"], reply(None, p)) for p in problems)
    return max(len(s.ids) - s.start for s in sequences)


def measure(
    model,
    tokenizer,
    validation: list[dict],
    test: list[dict],
    weights: str,
    num_thoughts: int = 4,
    thought_length: int = 28,
    seed: int = 0,
    temperatures=TEMPERATURES,
    max_new_tokens: int = 48,
) -> Performance:
    """Performance of a :class:`QuietStarForCausalLM` on ``test``; the temperature is chosen on ``validation``.

    ``weights``: ``"head"``, or ``"thoughts"`` for a model whose mixing head is untrained (every thought votes alike).
    ``max_new_tokens`` bounds the free replies that ``habits`` reads.
    """
    settings = {
        "num_thoughts": num_thoughts,
        "thought_length": thought_length,
        "weights": weights,
        "seed": seed,
        "max_new_tokens": longest_answer(tokenizer, [*validation, *test]),
    }
    chosen = best_temperature(model, tokenizer, validation, temperatures, **settings)
    drawn = accuracy_with_thoughts(model, tokenizer, test, temperature=chosen["temperature"], single=True, **settings)
    one = settings | {"num_thoughts": 1, "weights": "thoughts"}
    greedy = accuracy_with_thoughts(model, tokenizer, test, temperature=0.0, **one)["mixed"]
    fits = [strategy_of(t) in (p["fits"] or ["cot"]) for ts, p in zip(drawn["thoughts"], test, strict=True) for t in ts]
    return Performance(
        chosen["temperature"],
        chosen["by_temperature"],
        drawn["mixed"].numpy(),
        drawn["each"].numpy(),
        greedy.numpy(),
        direct_accuracy(model.lm, tokenizer, test),
        drawn["thoughts"],
        float(np.mean(fits)),
        habits(model.lm, tokenizer, test, max_new_tokens),
    )


def direct_accuracy(lm, tokenizer, problems: list[dict]) -> np.ndarray:
    """Exact match (0 or 1 per problem) of greedy answers without a thought: the thinking tokens are forbidden."""
    cap, tags = longest_answer(tokenizer, problems), tuple(thinking_ids(tokenizer))
    written = replies(lm, tokenizer, [p["question"] for p in problems], cap, tags, desc="direct")
    return np.array([answer_of(tokenizer, w) == p["answer"] for w, p in zip(written, problems, strict=True)], float)
