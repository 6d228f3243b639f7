"""A thought in words of one's own: what a model answers with it. And where in a text a model is unsure."""

import math
import re

import torch

from ..data.batches import answer_batch
from ..data.tokens import PLAIN_WORDS, encode_marked, encode_reply, pad, thinking_ids
from ..errors import WorkbookError
from ..evaluation.accuracy import answer_of
from ..evaluation.coherence import utility
from ..evaluation.episodes import ANSWER_LENGTH, Thought, checked_context, written_alone
from ..thoughts.generate import Thoughts
from ..thoughts.rescore import rescore_thoughts

MOST_CHARACTERS = 20_000  # of a text of one's own that is read
_TAGS, _OUTER = re.compile(f"({'|'.join(PLAIN_WORDS)})"), re.compile(r"^think\b\s*|\s*\bdone$")


class Answered(Thought):
    """Hold a thought that a model had alone. ``truth``: the probability of the true tokens, None if not known."""

    truth: float | None = None


def plain_words(text: str) -> str:
    """Return a thought with the words of its thinking tokens in their place, and without the two outer ones."""
    parts = [part.strip() for part in _TAGS.split(text)]
    return _OUTER.sub("", " ".join(PLAIN_WORDS.get(part, part) for part in parts if part))


def thought_ids(tokenizer, text: str | list[str]) -> list[int]:
    """Return the ids of a thought with both tags. Plain words become thinking tokens as in worked examples.

    The ``tokens`` of an episode's thought are taken as they are. Raises ``WorkbookError`` for a text that is empty, far
    too long, opens inside itself or has an unknown word.
    """
    if not isinstance(text, str):
        return [i for token in text for i in tokenizer.encode(token, add_special_tokens=False)]
    if len(text) > MOST_CHARACTERS:
        raise WorkbookError(f"the thought has {len(text):,} characters and at most {MOST_CHARACTERS:,} are read")
    words, (start, end, *inner) = plain_words(text.encode("utf-8", "replace").decode()), thinking_ids(tokenizer)
    if not words:
        raise WorkbookError("the thought is empty: write at least one word")
    ids = encode_marked(tokenizer, words)
    if {start, end} & set(ids):
        raise WorkbookError("a thought opens and closes once: leave out 'think' and 'done' inside it")
    if unknown := {tokenizer.unk_token_id, *tokenizer.all_special_ids}.difference(inner).intersection(ids):
        word = next((w for w in words.split() if unknown.intersection(encode_reply(tokenizer, w))), words)
        raise WorkbookError(f"the tokenizer does not know the word {word[:40]!r}: write another")
    return [start, *ids, end]


@torch.no_grad()
def answer_with(model, tokenizer, text, thoughts: list, position=None, answer=None, n_true=4) -> list[Answered]:
    """Return what a ``QuietStarForCausalLM`` makes of each thought alone, after token ``position`` of a text.

    ``thoughts``: as ``thought_ids`` takes them. The other parameters and the truth are those of ``think_at``.
    ``logprobs`` are at temperature 1. Raises ``WorkbookError`` as ``think_at`` and ``thought_ids`` do.
    """
    given = [thought_ids(tokenizer, t) for t in thoughts]
    context = checked_context(model, tokenizer, text, position, max(map(len, given)) + ANSWER_LENGTH)
    last, document = len(context) - 1 if position is None else position, context
    left = len(context) - 1 - last  # tokens of the text that follow
    if answer:
        document = answer_batch(tokenizer, [{"question": text, "answer": answer}])[0][0].tolist()
    (start, end, *_), device = thinking_ids(tokenizer), model.device
    tokens = pad(given, end, device=device)[None, None]  # (1, 1, K, T)
    lengths, at = (torch.tensor(x, device=device) for x in ([[[len(ids) for ids in given]]], [[last]]))
    place = torch.arange(tokens.shape[-1], device=device).expand_as(tokens)
    sampled = (place > 0) & (place < lengths[..., None])
    drawn = Thoughts(tokens, tokens * 0.0, sampled, lengths, None, at, 1.0, (), start, end)
    ids = torch.tensor([document], device=device)
    ahead = n_true if left else max(1, len(document) - 1 - last)  # the whole answer
    settings = {"n_true": ahead, "true_logits": True, "forbid_true": tuple(model.config.hidden_ids)}
    scored = rescore_thoughts(model.lm, ids, drawn, torch.ones_like(ids), **settings)
    room = min(n_true, left) if left else ANSWER_LENGTH
    (written,) = written_alone(model, tokenizer, [context[: last + 1]], tokens[:, 0], lengths[:, 0], room)
    answers = [answer_of(tokenizer, ids) for ids in written]
    known, gains, made = bool(scored.valid.any()), utility(scored)[0, 0].tolist(), []
    truths = scored.true_logprobs[0, 0].sum(-1).exp().tolist()  # a token that there is not has 0 nats
    for k, own in enumerate(given):
        top = zip(*(x.tolist() for x in scored.true_full[0, 0, k, 0].topk(5)), strict=True)
        found = {"logprobs": scored.thought_logprobs[0, 0, k, : len(own)].tolist(), "answer": answers[k]}
        found |= {"utility": gains[k], "truth": truths[k]} if known else {"utility": None}
        found["next_tokens"] = [(tokenizer.decode([i]), round(math.exp(p), 4)) for p, i in top]
        made.append(Answered(tokens=[tokenizer.decode([i]) for i in own], **found))
    return made


@torch.no_grad()
def entropies(model, tokenizer, text: str) -> list[float]:
    """Return the plain prediction's entropy (nats) after each token, thinking tokens left out. Raises as ``think_at``."""
    ids = checked_context(model, tokenizer, text, None, 0)
    logits = model.lm(torch.tensor([ids], device=model.device)).logits[0].float()
    logits[:, list(model.config.hidden_ids)] = -torch.inf
    return torch.special.entr(logits.softmax(-1)).sum(-1).tolist()
