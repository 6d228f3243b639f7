"""Token sequences: a context and a reply as ids, thinking tokens put in by id, padded batches, length buckets."""

import functools
import random
from dataclasses import dataclass

import torch

from .errors import WorkbookError
from .tokens import PLAIN_WORDS, thinking_ids


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
    return Sequence(prefix + tokenizer.encode(" " + reply, add_special_tokens=False) + [tokenizer.eos_token_id],
                    len(prefix))  # fmt: skip


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
        raise WorkbookError("two marker words begin with the same token in this tokenizer; choose other words in tokens.py")
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
