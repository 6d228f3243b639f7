"""The eight thinking tokens, and texts as token ids.

Tokens are added to any Hugging Face model without a change of what it already says. Sequences hold a context and a
reply, with thinking tokens put in by id. Batches hold sequences of like length.
"""

import copy
import functools
import random
import re
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from ..errors import WorkbookError

# A token, the word a prompted model writes where a baked one writes the token, and the words whose embeddings are
# averaged into its first row. Replies are made and sampled in words, then turned into tokens one for one, so the
# prompted teacher never has to read rows it was not trained on.
_TOKENS = (
    ("<think>", "think", "think work out"),
    ("</think>", "done", "done answer so"),
    ("<step>", "step", "step next then"),
    ("<reason>", "reason", "reason because side"),
    ("<mece>", "parts", "parts all groups"),
    ("<falsify>", "refute", "refute wrong false"),
    ("<expert>", "expert", "expert rule how"),
    ("<doubt>", "doubt", "doubt check again"),
)
THINKING_TOKENS = tuple(token for token, _, _ in _TOKENS)
PLAIN_WORDS = {token: word for token, word, _ in _TOKENS}
_TAG = re.compile("<(?=" + "|".join(token[1:] for token in THINKING_TOKENS) + ")")  # the bracket of one in a text
untagged = functools.partial(_TAG.sub, "< ")  # a text whose thinking tokens are plain text: a space after the bracket
_NAME = r"[\w:]*(?:think|thought|reason)\w*\|?[>\]▷]"
_INSIDE = r"[^<\[◁]*"
_BRACKET = r"[<\[◁]\|?"
_CLOSED = rf"{_BRACKET}/{_NAME}\s*"
_OPENED = re.compile(  # a thought at the end of a chat template: opened, opened and closed, or closed alone
    rf"(?:{_BRACKET}{_NAME}(?:{_INSIDE}{_CLOSED})?|{_CLOSED})\s*$", re.IGNORECASE
)


def thinking_ids(tokenizer) -> list[int]:
    """Return the ids of the eight tokens, in order. Raises ``WorkbookError`` if one is missing."""
    vocabulary = tokenizer.get_vocab()
    if missing := ", ".join(t for t in THINKING_TOKENS if t not in vocabulary):
        raise WorkbookError(f"the tokenizer lacks {missing}: call add_thinking_tokens(model, tokenizer) first")
    return [vocabulary[t] for t in THINKING_TOKENS]


@torch.no_grad()
def add_thinking_tokens(model, tokenizer):
    """Add those of the eight thinking tokens that are missing, and return (model, tokenizer).

    A new input or output row lies in the direction of the mean of a few plain words that say what the token means
    (``_TOKENS``), seen from the mean of all rows and at the median distance from it. Scaled from zero instead, the part
    that all rows share would grow too, and the tokens swallow the predictions of a pretrained model. Rows and logits of
    all other tokens stay as they are, a padded embedding matrix is never shrunk, and a token that is there keeps its id,
    row and flags: a second call changes nothing. Sets ``config.think_token_id`` and ``config.end_think_token_id``, and
    padding to end-of-text where the tokenizer has none. Raises ``WorkbookError``, with nothing changed, if it has no
    end-of-text, or gives a new token the id of another because its ids have holes.
    """
    check_end_of_text(tokenizer)
    known = tokenizer.get_vocab()
    new = [t for t in THINKING_TOKENS if t not in known]
    added = [AddedToken(t, normalized=False, special=True) for t in new]
    trial = copy.deepcopy(tokenizer)
    trial.add_tokens(added)
    if taken := set(trial.convert_tokens_to_ids(new)) & set(known.values()):
        holes = f"its {len(known)} tokens have ids up to {max(known.values())}"
        raise WorkbookError(f"the tokenizer gives new tokens the id {min(taken)} of another ({holes}): fill the holes")
    plain_ids = {token: _plain_ids(tokenizer, words) for token, _, words in _TOKENS if token in new}
    tokenizer.add_tokens(added)
    ids = tokenizer.convert_tokens_to_ids(new)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if (rows := vocabulary_size(tokenizer)) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if new:
        matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        old_rows = torch.tensor(sorted(set(known.values()) - set(ids)))
        for weight in matrices.values():  # (vocab, hidden)
            centre = weight[old_rows].mean(0)
            distance = (weight[old_rows] - centre).norm(dim=1).median()
            for token, row in zip(new, ids, strict=True):
                apart = weight[plain_ids[token]].mean(0) - centre
                weight[row] = centre + apart * (distance / apart.norm().clamp_min(1e-8))
        if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
            bias[ids] = bias[old_rows].mean()
    model.config.think_token_id, model.config.end_think_token_id, *_ = thinking_ids(tokenizer)
    return model, tokenizer


def _plain_ids(tokenizer, words: str) -> list[int]:
    """Return the ids of the words that the tokenizer can spell, or end-of-text if it can spell none."""
    unknown = tokenizer.unk_token_id
    return [i for w in words.split() for i in encode_reply(tokenizer, w) if i != unknown] or [tokenizer.eos_token_id]


def check_end_of_text(tokenizer) -> None:
    """Raise ``WorkbookError`` if the tokenizer has no end-of-text token of its own."""
    if tokenizer.eos_token is None or tokenizer.eos_token not in tokenizer.get_vocab():
        raise WorkbookError("the tokenizer has no end-of-text token: set tokenizer.eos_token to one that it knows")


def vocabulary_size(tokenizer) -> int:
    """Return the rows that a model needs for the tokenizer: its greatest id and one. Ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def fast_tokenizer(raw: Tokenizer, longest: int, **special: str) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for ``transformers``: padded on the left, texts of up to ``longest`` tokens."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", model_max_length=longest, **special)


@dataclass
class Sequence:
    """``ids`` of a whole document and ``start``, the index of the first reply token."""

    ids: list[int]
    start: int


def encode_context(tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt or question, with the beginning-of-text token where the tokenizer has one.

    With a chat template it is a user's turn, and the assistant's begins with ``Answer:``, so that a reply's first word
    is cut into tokens as within a text. A thought that the template opens is left out: the model opens its own. A
    thinking token that stands in the text is plain text, with a space after its bracket.
    """
    text = untagged(text)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        text = _OPENED.sub("", text) + "Answer:"
        return tokenizer.encode(text, add_special_tokens=False)  # the template has its own beginning
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer.encode(text, add_special_tokens=False)


def encode_reply(tokenizer, text: str) -> list[int]:
    """Return the ids of a text that goes on from a context, cut as behind another word."""
    return tokenizer.encode(text if _puts_a_space_first(tokenizer) else " " + text, add_special_tokens=False)


@functools.lru_cache(maxsize=8)
def _puts_a_space_first(tokenizer) -> bool:
    """Whether the tokenizer itself puts a space before a text, as Llama-2's does, which would make it two."""
    texts = ("think", " think", "done", "done think")
    bare, spaced, first, both = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    return both == first + bare and both != first + spaced


def encode(tokenizer, context: str, reply: str) -> Sequence:
    """Return context, reply and end-of-text. Tokenised apart, a reply has the same ids after every context."""
    start = encode_context(tokenizer, context)
    return Sequence([*start, *encode_reply(tokenizer, reply), tokenizer.eos_token_id], len(start))


@functools.lru_cache(maxsize=8)
def line_ends(tokenizer) -> list[int]:
    """Return the ids of the tokens that end a line."""
    return [i for i in range(vocabulary_size(tokenizer)) if "\n" in tokenizer.decode([i])]


@functools.lru_cache(maxsize=8)
def marker_spellings(tokenizer) -> dict[int, list[int]]:
    """Return, by thinking-token id, its plain word's ids inside a text. Raises ``WorkbookError`` if two begin alike."""
    words = [encode_reply(tokenizer, word) for word in PLAIN_WORDS.values()]
    first = {ids[0] for ids in words}
    if len(first) == 1 and not tokenizer.decode([*first]).strip():
        apart = "so marker words cannot be told apart by their first token"
        raise WorkbookError(f"this tokenizer cuts the space before every word off, {apart}: take another tokenizer")
    if len(first) < len(words):
        raise WorkbookError("two marker words begin with the same token here: choose other words in tokens.py")
    return dict(zip(thinking_ids(tokenizer), words, strict=True))


def mark(reply: list[int], spellings: dict[int, list[int]]) -> tuple[list[int], list[int]]:
    """Put thinking tokens where a plain reply spells their words.

    Returns the marked ids and, for each of them, the index of the last plain token it stands for: the plain position
    whose next-token distribution belongs beside the marked position's.
    """
    marked, last, i = [], [], 0
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


def encode_marked(tokenizer, text: str) -> list[int]:
    """Return the ids of a reply in plain words, with thinking tokens where it spells theirs."""
    return mark(encode_reply(tokenizer, text), marker_spellings(tokenizer))[0]


def in_words(text: str) -> str:
    """Return a text with the plain words of its thinking tokens in their place, each with spaces around it."""
    for token, word in PLAIN_WORDS.items():
        text = text.replace(token, f" {word} ")
    return text


def pad(rows: list[list[int]], value: int, side: str = "right", device=None) -> torch.Tensor:
    """Return the rows as one tensor ``(rows, longest)``, filled up with ``value`` on ``side``."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(r)) for r in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)], device=device)


def padded(tokenizer, rows: list[list[int]], device=None, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows as ids ``(rows, longest)``, filled up on ``side``, and their mask of that shape."""
    return pad(rows, tokenizer.pad_token_id, side, device), pad([[1] * len(row) for row in rows], 0, side, device)


def length_batches(lengths: list[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """Shuffle one epoch, sort it by length inside pools of eight batches, and return index batches, shuffled."""
    order, batches, pool = list(range(len(lengths))), [], 8 * batch_size
    rng.shuffle(order)
    for i in range(0, len(order), pool):
        chunk = sorted(order[i : i + pool], key=lambda k: lengths[k])
        cut = [chunk[j : j + batch_size] for j in range(0, len(chunk), batch_size)]
        rng.shuffle(cut)
        batches += cut
    return batches
