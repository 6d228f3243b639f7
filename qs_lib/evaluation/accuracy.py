"""Exact match of written replies, with thoughts and without, measured by the same procedure each time."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from ..data.answers import whole_reply
from ..data.batches import answer_batch
from ..data.strategies import reply, strategy_of
from ..data.tokens import encode, encode_context, encode_reply, line_ends, mark, marker_spellings, padded, thinking_ids
from ..model import ThinkingCache
from ..stats import interval
from ..thoughts.rescore import rescore_thoughts

TEMPERATURES = (0.0, 0.5, 0.7, 1.0)
STREAMS = 320  # texts with a thought that are read together
WRITTEN, TOO_LONG = -1, -2  # in place of a difference, see `first_difference`


@dataclass(frozen=True)
class Budget:
    """Say which thoughts to draw at a position.

    There are ``num_thoughts`` of at most ``thought_length`` tokens (both tags counted), drawn at ``temperature`` (0:
    greedy) from ``seed``. Functions that take a ``**budget`` take these names.
    """

    num_thoughts: int = 4
    thought_length: int = 28
    temperature: float = 1.0
    seed: int = 0

    @property
    def drawing(self) -> dict:
        """All but the seed, as ``qs_lib.generate_thoughts`` takes it."""
        return {name: value for name, value in vars(self).items() if name != "seed"}

    def generator(self) -> torch.Generator:
        """Return a new generator at the seed."""
        return torch.Generator().manual_seed(self.seed)


def sorted_batches(lengths: list[int], size: int) -> list[list[int]]:
    """Return indices in batches of ``size``, shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + size] for i in range(0, len(order), size)]


def reply_statistics(model, tokenizer, problems: list[dict], max_new_tokens: int = 48) -> dict:
    """Return shares of greedy replies: ``accuracy`` (exact match), ``thinking_use`` and ``strategy_fit`` (it suits)."""
    written = replies(model, tokenizer, [p["question"] for p in problems], max_new_tokens)
    rows = read_replies(tokenizer, problems, written)
    names = {"accuracy": "correct", "thinking_use": "thinks", "strategy_fit": "fits"}
    return {name: sum(row[key] for row in rows) / len(problems) for name, key in names.items()}


def read_replies(tokenizer, problems: list[dict], written: list[list[int]]) -> list[dict]:
    """Read each reply (ids): ``answer``, ``thinks``, ``correct``, ``strategy`` ("none" without a thought), ``fits``."""
    (start, end, *_), rows = thinking_ids(tokenizer), []
    for problem, ids in zip(problems, written, strict=True):
        ids, _ = mark(ids, marker_spellings(tokenizer))  # a prompted champion writes the plain words
        thinks, answer = bool(ids) and ids[0] == start and end in ids, answer_of(tokenizer, ids, (end,))
        strategy = strategy_of(tokenizer.decode(ids[: ids.index(end)])) if thinks else None
        row = {"answer": answer, "thinks": thinks, "correct": answer == problem["answer"]}
        rows.append(row | {"strategy": strategy or "none", "fits": strategy in (problem["fits"] or ["cot"])})
    return rows


@torch.no_grad()
def replies(
    model, tokenizer, contexts, max_new_tokens=48, forbid=(), temperature=0.0, batch_size=240, seed=0, desc="reply"
) -> list[list[int]]:
    """Return a plain causal LM's replies: ids of a line, not its end nor ``forbid``. Greedy at ``temperature`` 0."""
    torch.manual_seed(seed)
    ends = reply_ends(model, tokenizer)
    stops, encoded, out = set(ends), [encode_context(tokenizer, c) for c in contexts], [None] * len(contexts)
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(list(forbid))] if forbid else [])
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    if temperature:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings |= {"do_sample": bool(temperature), "logits_processor": processors, "repetition_penalty": 1.0}
    for rows in tqdm(sorted_batches([len(c) for c in contexts], batch_size), desc=desc, leave=False):
        ids, mask = padded(tokenizer, [encoded[k] for k in rows], model.device, "left")
        written = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
        for k, row in zip(rows, written.tolist(), strict=True):
            out[k] = list(itertools.takewhile(lambda i: i not in stops, row))
    return out


def end_ids(model, tokenizer) -> list[int]:
    """Return the ids that end a reply: end-of-text, and what the model's own configurations name, as an end of turn."""
    named = [tokenizer.eos_token_id]
    for source in (model.config.get_text_config(), model.config, model.generation_config):
        found = getattr(source, "eos_token_id", None)
        named += found if isinstance(found, list | tuple) else [found]
    return list(dict.fromkeys(int(i) for i in named if i is not None))


def reply_ends(model, tokenizer) -> list[int]:
    """Return the ids that end a reply of one line: :func:`end_ids` and line ends."""
    return [*end_ids(model, tokenizer), *line_ends(tokenizer)]


def answer_of(tokenizer, reply: list[int], end_of_thought: tuple[int, ...] = ()) -> str:
    """Return the answer a reply gives: its text after the last end-of-thought id, without the closing stop."""
    for end in end_of_thought:
        if end in reply:
            reply = reply[len(reply) - reply[::-1].index(end) :]
    return whole_reply(tokenizer.decode(reply, skip_special_tokens=False))


@torch.no_grad()
def decode_with_thoughts(model, tokenizer, contexts, tokens, lengths, weights="head", max_new_tokens=4) -> list[list]:
    """Return greedy replies, ids of a line without its end, of a ``QuietStarForCausalLM`` to contexts (ids) with thoughts.

    ``tokens`` (rows, K, T) and ``lengths`` (rows, K) may be any thoughts: own, foreign, shuffled. ``weights``: see
    ``QuietStarForCausalLM.branch_weights``.
    """
    whole = [len(c) + longest for c, longest in zip(contexts, lengths.amax(1).tolist(), strict=True)]
    ends, out, size = reply_ends(model, tokenizer), [None] * len(contexts), max(1, STREAMS // (1 + tokens.shape[1]))
    for rows in tqdm(sorted_batches(whole, size), desc="answer", leave=False, delay=2):
        ids, mask = padded(tokenizer, [contexts[r] for r in rows], model.device, "left")
        cache = ThinkingCache(ids, mask)
        cache.restart(tokens[rows], lengths[rows], tokenizer.pad_token_id, plain=weights != "thoughts")
        written = _decode(model, cache, ends, weights, max_new_tokens)
        for r, reply_ids in zip(rows, written, strict=True):
            out[r] = reply_ids
    return out


def _decode(model, cache, ends: list[int], weights: str, max_new_tokens: int) -> list[list[int]]:
    """Write on from a cache until every row has ended."""
    out, open_rows = [[] for _ in cache.ids], set(range(len(cache.ids)))
    for _ in range(max_new_tokens):
        states = cache.read(model)
        chosen = model.mix(*states, model.branch_weights(*states, weights)).argmax(-1)
        open_rows -= {row for row in open_rows if chosen[row] in ends}
        for row in open_rows:
            out[row].append(chosen[row].item())
        if not open_rows:
            break
        cache.append(chosen[:, None])
    return out


def single_thoughts(tokens, lengths):
    """Return thoughts (rows, K, T) and lengths (rows, K) as rows of one thought: (rows * K, 1, T), (rows * K, 1)."""
    return tokens.flatten(0, 1).unsqueeze(1), lengths.view(-1, 1)


@torch.no_grad()
def first_difference(model, ids, mask, thoughts, weights: str = "head", max_new_tokens: int = 6):
    """Return where greedy decoding first leaves what follows the thoughts in their texts, ids and mask (B, L).

    ``thoughts`` stand at one position a text. Two results: with all thoughts of a text together (B, 2), and with each
    alone (B, K, 2). The pairs are the number of true tokens that it would write, and the other token that it would
    write next. The number is ``WRITTEN`` where it would write the truth to its end, and ``TOO_LONG`` where the truth is
    longer than ``max_new_tokens`` and its end-of-text. ``weights``: see ``QuietStarForCausalLM.branch_weights``.

    The true reply is to greedy decoding what a draft is to speculative decoding (Leviathan et al., arXiv 2211.17192).
    Where every token of it is the likeliest, it would be written. One pass that reads each text once finds that.
    """
    k, parts = thoughts.tokens.shape[2], []
    size = max(1, STREAMS // (1 + k))
    last = mask.sum(1) - 1 - thoughts.positions[:, 0]  # tokens after the thoughts
    for part in (slice(i, i + size) for i in range(0, len(ids), size)):
        ahead, forbid = int(last[part].clamp(max=max_new_tokens + 1).max()), model.config.hidden_ids
        scored = rescore_thoughts(model.lm, ids[part], thoughts.part(part), mask[part], ahead, forbid_true=forbid)
        together = torch.full((len(ids[part]), 2), WRITTEN, device=ids.device)
        alone, given = together[:, None].repeat(1, k, 1), model.mixing_weights(scored, weights)
        for step in range(ahead):  # one token at a time: K predictions over a large vocabulary are many numbers
            past, true = ~scored.valid[:, 0, step], scored.true[:, 0, step]
            base, after = scored.base_hidden[:, 0, step], scored.thought_hidden[:, 0, :, step]
            _leave(together, step, model.mix(base, after, given[:, 0, step]).argmax(-1), true, past)
            _leave(alone, step, model.visible_log_probs(after).argmax(-1), true[:, None], past[:, None])
        long = last[part] > max_new_tokens + 1
        together[long], alone[long] = TOO_LONG, TOO_LONG
        parts.append((together, alone))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _leave(found, step: int, written, true, past) -> None:
    """Note in ``found`` (..., 2), in place, where ``written`` (...) is the first token other than the true one."""
    new = (found[..., 0] == WRITTEN) & (written != true) & ~past
    found[new] = torch.stack([torch.full_like(written, step), written], -1)[new]


@torch.no_grad()
def accuracy_with_thoughts(
    model, tokenizer, problems, weights="head", single=False, batch_size=240, max_new_tokens=6, **budget
) -> dict:
    """Return exact match of greedily decoded replies with thoughts after the question, as floats 0 or 1.

    ``mixed`` (problems,): all thoughts of a problem together. With ``single`` also ``each`` (problems, K): every
    thought answers alone. ``thoughts``: their texts without tags, K per problem. ``weights``: see
    ``QuietStarForCausalLM.branch_weights``. ``budget``: see :class:`Budget`.
    """
    budget = Budget(**budget)
    k, generator = budget.num_thoughts, budget.generator()
    mixed, each, texts = torch.zeros(len(problems)), torch.zeros(len(problems), k), [None] * len(problems)
    for rows in sorted_batches([len(p["question"]) for p in problems], batch_size):
        asked = [problems[r] for r in rows]
        ids, mask, last = answer_batch(tokenizer, asked, model.device)
        thoughts = model.think(ids, mask, last, generator, **budget.drawing, with_hidden=False)
        drawn = thoughts.tokens[:, 0], thoughts.lengths[:, 0]
        together, alone = first_difference(model, ids, mask, thoughts, weights, max_new_tokens)
        mixed[rows] = _right(model, tokenizer, asked, drawn, together, weights, max_new_tokens)
        if single:
            own = [p for p in asked for _ in range(k)], single_thoughts(*drawn), alone.flatten(0, 1)
            each[rows] = _right(model, tokenizer, *own, "thoughts", max_new_tokens).view(len(rows), k)
        for r, tokens, ends in zip(rows, *drawn, strict=True):
            texts[r] = [tokenizer.decode(t[1 : n - 1]) for t, n in zip(tokens, ends, strict=True)]
    return {"mixed": mixed, "thoughts": texts} | ({"each": each} if single else {})


def _right(model, tokenizer, problems, drawn, differs, weights, max_new_tokens) -> torch.Tensor:
    """Return 1 where the reply gives the true answer, if in other words, else 0.

    ``differs`` (rows, 2), of :func:`first_difference`, settles most. Only what may still become the answer is written.
    """
    right, left, ends = torch.zeros(len(problems)), [], set(reply_ends(model, tokenizer))
    for row, (problem, (at, token)) in enumerate(zip(problems, differs.tolist(), strict=True)):
        truth = encode_reply(tokenizer, reply(None, problem))
        if at == WRITTEN and answer_of(tokenizer, truth) == problem["answer"]:  # a vocabulary may not spell it
            right[row] = 1
        elif at < 0 or token in ends or _may_become(tokenizer.decode([*truth[:at], token]), problem["answer"]):
            left.append(row)
    asked = [problems[row] for row in left]
    contexts = [encode_context(tokenizer, p["question"]) for p in asked]
    given = (each[left] for each in drawn)
    written = decode_with_thoughts(model, tokenizer, contexts, *given, weights, max_new_tokens)
    for row, reply_ids, problem in zip(left, written, asked, strict=True):
        right[row] = answer_of(tokenizer, reply_ids) == problem["answer"]
    return right


def _may_become(text: str, answer: str) -> bool:
    """Tell whether a reply that begins with ``text`` may still give ``answer``. Spaces do not count, to be safe."""
    text, answer = ("".join(each.split()) for each in (text, answer))
    return chr(0xFFFD) in text or answer.startswith(text) or text == answer + "."  # the sign of half a character


@dataclass
class Performance:
    """Hold exact match on test problems, arrays of 0 and 1, one row per problem.

    ``mixed``: all thoughts of a problem answer together, at ``temperature`` (the best on validation problems, all tried
    in ``by_temperature``). ``single`` (problems, K): each of these thoughts answers alone. ``greedy``: one greedy
    thought. ``without``: no thought, thinking tokens forbidden. ``thoughts``: decoded, per problem. ``thought_fit``:
    share of them whose strategy suits the problem. ``statistics``: :func:`reply_statistics`.
    """

    temperature: float
    by_temperature: dict[float, float]
    mixed: np.ndarray
    single: np.ndarray
    greedy: np.ndarray
    without: np.ndarray
    thoughts: list[list[str]] = field(repr=False)
    thought_fit: float
    statistics: dict[str, float]

    def share(self, name: str) -> tuple[float, float, float]:
        """Return accuracy of ``mixed``, ``single``, ``greedy`` or ``without`` with its 95 % interval over problems."""
        return interval(getattr(self, name))


def read_problems(path: str | Path) -> list[dict]:
    """Return the records of a parquet file that notebook 02 wrote."""
    return pq.read_table(path).to_pylist()


def longest_answer(tokenizer, problems: list[dict]) -> int:
    """Return the tokens to allow for an answer: those of the longest true one, and its closing stop."""
    return max(len(s.ids) - s.start for s in (encode(tokenizer, p["question"], reply(None, p)) for p in problems))


def measure(
    model, tokenizer, validation, test, weights: str, temperatures=TEMPERATURES, max_new_tokens=48, **budget
) -> Performance:
    """Return the performance of a ``QuietStarForCausalLM`` on ``test``.

    Its temperature is the best on ``validation``, of equals the highest, so that thoughts differ.
    ``weights``: ``"head"``, or ``"thoughts"`` for a model whose mixing head is untrained (every thought votes alike).
    ``max_new_tokens`` bounds its own greedy replies. ``budget``: see :class:`Budget`.
    """
    settings = budget | {"max_new_tokens": longest_answer(tokenizer, [*validation, *test])}
    by = {}
    for t in temperatures:
        found = accuracy_with_thoughts(model, tokenizer, validation, weights, temperature=t, **settings)
        by[t] = found["mixed"].mean().item()
    best = max(by, key=lambda t: (by[t], t))
    drawn = accuracy_with_thoughts(model, tokenizer, test, weights, True, **settings | {"temperature": best})
    one = settings | {"num_thoughts": 1, "temperature": 0.0}
    greedy = accuracy_with_thoughts(model, tokenizer, test, "thoughts", **one)["mixed"]
    arrays = drawn["mixed"].numpy(), drawn["each"].numpy(), greedy.numpy(), direct_accuracy(model.lm, tokenizer, test)
    fits = [strategy_of(t) in (p["fits"] or ["cot"]) for ts, p in zip(drawn["thoughts"], test, strict=True) for t in ts]
    statistics = reply_statistics(model.lm, tokenizer, test, max_new_tokens)
    return Performance(best, by, *arrays, drawn["thoughts"], float(np.mean(fits)), statistics)


def direct_accuracy(lm, tokenizer, problems: list[dict]) -> np.ndarray:
    """Return exact match (0 or 1 per problem) of greedy answers without a thought: thinking tokens are forbidden."""
    cap, tags = longest_answer(tokenizer, problems), tuple(thinking_ids(tokenizer))
    written = replies(lm, tokenizer, [p["question"] for p in problems], cap, tags, desc="direct")
    return np.array([answer_of(tokenizer, w) == p["answer"] for w, p in zip(written, problems, strict=True)], float)
