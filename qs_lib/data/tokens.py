"""The eight thinking tokens, and texts as token ids.

Tokens are added to any Hugging Face model without moving what it already says. Sequences hold a context and a reply,
thinking tokens put in by id, padded into batches of like length.
"""

import functools
import random
from dataclasses import dataclass

import torch
from tokenizers import AddedToken

from ..errors import WorkbookError

THINKING_TOKENS = ("<think>", "</think>", "<step>", "<reason>", "<mece>", "<falsify>", "<expert>", "<doubt>")
# The word a prompted model writes where a baked one writes the token. Replies are made and sampled in words, then
# turned into tokens one for one, so the prompted teacher never has to read rows it was not trained on.
PLAIN_WORDS = {
    "<think>": "think",
    "</think>": "done",
    "<step>": "step",
    "<reason>": "reason",
    "<mece>": "parts",
    "<falsify>": "refute",
    "<expert>": "expert",
    "<doubt>": "doubt",
}
# Plain words whose embeddings are averaged into a new token's first row.
DESCRIPTIONS = {
    "<think>": "think work out",
    "</think>": "done answer so",
    "<step>": "step next then",
    "<reason>": "reason because side",
    "<mece>": "parts all groups",
    "<falsify>": "refute wrong false",
    "<expert>": "expert rule how",
    "<doubt>": "doubt check again",
}


def thinking_ids(tokenizer) -> list[int]:
    """Ids of the eight tokens, in the order of ``THINKING_TOKENS``. Raises ``WorkbookError`` if one is missing."""
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in THINKING_TOKENS if t not in vocabulary]
    if missing:
        raise WorkbookError(
            f"the tokenizer lacks {', '.join(missing)}: call add_thinking_tokens(model, tokenizer) first"
        )
    return [vocabulary[t] for t in THINKING_TOKENS]


@torch.no_grad()
def add_thinking_tokens(model, tokenizer):
    """Add the missing ones of the eight thinking tokens; a second call changes nothing. Returns (model, tokenizer).

    New input and output rows are the mean of the rows of a few plain words that say what the token means
    (``DESCRIPTIONS``), scaled to the median norm of the existing rows. Rows and logits of all other tokens stay as
    they are, a padded embedding matrix is never shrunk, and a token the tokenizer has already keeps its id, row and
    flags. Sets ``config.think_token_id`` and ``config.end_think_token_id``.
    """
    known = tokenizer.get_vocab()
    new = [t for t in THINKING_TOKENS if t not in known]
    plain_ids = {t: _plain_ids(tokenizer, DESCRIPTIONS[t]) for t in new}
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in new])
    ids = tokenizer.convert_tokens_to_ids(new)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new:
        matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        old_rows = torch.tensor(sorted(set(known.values()) - set(ids)))
        for weight in matrices.values():
            norm = weight[old_rows].norm(dim=1).median()
            for token, row in zip(new, ids, strict=True):
                mean = weight[plain_ids[token]].mean(0)
                weight[row] = mean * (norm / mean.norm().clamp_min(1e-8))
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias[ids] = bias[old_rows].mean()
    every = thinking_ids(tokenizer)
    model.config.think_token_id, model.config.end_think_token_id = every[0], every[1]
    return model, tokenizer


def _plain_ids(tokenizer, words: str) -> list[int]:
    """Ids of the words the tokenizer can spell; all of its ordinary rows' stand-in, the whole text, if none."""
    unknown = tokenizer.unk_token_id
    ids = [i for w in words.split() for i in tokenizer.encode(" " + w, add_special_tokens=False) if i != unknown]
    return ids or tokenizer.encode(tokenizer.eos_token, add_special_tokens=False)


@dataclass
class Sequence:
    """``ids`` of a whole document and ``start``, the index of the first reply token."""

    ids: list[int]
    start: int


def encode_context(tokenizer, text: str) -> list[int]:
    """Ids of a prompt or question, with the beginning-of-text token where the tokenizer has one.

    With a chat template it is a user's turn, and the assistant's begins with ``Answer:``, so that a reply's first word is cut
    into tokens as within a text.
    """
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + "Answer:"
        return tokenizer.encode(text, add_special_tokens=False)  # the template has its own beginning
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer.encode(text, add_special_tokens=False)


def encode(tokenizer, context: str, reply: str) -> Sequence:
    """``context`` then `` reply`` then end-of-text. The two are tokenised apart, so the reply's ids never depend on
    the context and the teacher's and the student's copies are equal."""
    prefix = encode_context(tokenizer, context)
    return Sequence(
        prefix + tokenizer.encode(" " + reply, add_special_tokens=False) + [tokenizer.eos_token_id], len(prefix)
    )


@functools.lru_cache(maxsize=8)
def line_ends(tokenizer) -> list[int]:
    """Ids of the tokens that end a line."""
    return [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]


@functools.lru_cache(maxsize=8)
def marker_spellings(tokenizer) -> dict[int, list[int]]:
    """Thinking-token id -> ids of its plain word inside a text. Raises ``WorkbookError`` if two words begin alike."""
    spellings = {
        tag: tokenizer.encode(" " + word, add_special_tokens=False)
        for tag, word in zip(thinking_ids(tokenizer), PLAIN_WORDS.values(), strict=True)
    }
    if len({ids[0] for ids in spellings.values()}) < len(spellings):
        raise WorkbookError(
            "two marker words begin with the same token in this tokenizer; choose other words in tokens.py"
        )
    return spellings


def mark(reply: list[int], spellings: dict[int, list[int]]) -> tuple[list[int], list[int]]:
    """Put thinking tokens where a plain reply spells their words.

    Returns the marked ids and, for each of them, the index of the last plain token it stands for: the plain position
    whose next-token distribution belongs beside the marked position's.
    """
    marked, last = [], []
    i = 0
    while i < len(reply):
        for tag, word in spellings.items():
            if reply[i : i + len(word)] == word:
                marked.append(tag)
                i += len(word)
                break
        else:
            marked.append(reply[i])
            i += 1
        last.append(i - 1)
    return marked, last


def pad(rows: list[list[int]], value: int, side: str = "right", device=None) -> torch.Tensor:
    """(rows, longest) LongTensor, filled up with ``value`` on ``side``."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(r)) for r in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)], device=device)


def padded(tokenizer, rows: list[list[int]], device=None, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows as ids ``(rows, longest)``, filled up on ``side``, and their mask of that shape."""
    ones = [[1] * len(row) for row in rows]
    return pad(rows, tokenizer.pad_token_id, side, device), pad(ones, 0, side, device)


def length_batches(lengths: list[int], batch_size: int, rng: random.Random, pool: int = 8) -> list[list[int]]:
    """One epoch of index batches: shuffled, sorted by length inside pools of ``pool`` batches, batches shuffled."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for i in range(0, len(order), pool * batch_size):
        chunk = sorted(order[i : i + pool * batch_size], key=lambda k: lengths[k])
        cut = [chunk[j : j + batch_size] for j in range(0, len(chunk), batch_size)]
        rng.shuffle(cut)
        batches += cut
    return batches
