"""Thoughts drawn on demand: at one token of any text, scored and recorded as an :class:`~qs_lib.episode.Episode`."""

import torch

from .data.batches import answer_batch
from .data.tokens import encode_context
from .episode import Episode
from .errors import WorkbookError
from .evaluate import answer_of
from .model import QuietStarForCausalLM
from .scoring import record

STEPS = ("drawing", "scoring", "answering without thoughts", "answering with thoughts", "answering with each alone")


def text_tokens(tokenizer, text: str) -> list[str]:
    """The tokens of a text as the model reads it, in order: what a position counts."""
    return [tokenizer.decode([i]) for i in encode_context(tokenizer, text)]


@torch.no_grad()
def think_at(model, tokenizer, text: str, position: int | None = None, answer: str | None = None, num_thoughts: int = 4,
             thought_length: int = 28, temperature: float = 1.0, seed: int = 0, n_true: int = 4, scale=None,
             max_new_tokens: int = 6, stage: str = "live", progress=lambda done, of, what: None) -> Episode:  # fmt: skip
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
        torch.tensor([read]), positions=torch.tensor([[last]]), generator=torch.Generator().manual_seed(seed),
        num_thoughts=num_thoughts, thought_length=thought_length, temperature=temperature,
    )  # fmt: skip
    truth = answer if at_end else answer_of(tokenizer, following)
    problem = {"problem": 0, "question": text, "answer": truth or None}
    made = record(model, tokenizer, document, thoughts, problem, tokens, n_true, scale, stage, begin)
    progress(len(STEPS), len(STEPS), "done")
    return made


def _checked(model, tokenizer, text, position, room) -> list[int]:
    """The ids of the text, after a look at everything that a user can get wrong."""
    if not isinstance(model, QuietStarForCausalLM):
        raise WorkbookError("thoughts are drawn by a QuietStarForCausalLM: wrap the model with its from_base(model, tokenizer)")
    if not text.strip():
        raise WorkbookError("there is no text to think about: write at least one word")
    most = min(tokenizer.model_max_length, getattr(model.config.text_config, "max_position_embeddings", None) or 10**9)
    if len(text) > 100 * most:
        raise WorkbookError(f"the text has {len(text):,} characters, far more than the model's {most:,} tokens: shorten it")
    context = encode_context(tokenizer, text)
    if len(context) + room > most:
        raise WorkbookError(f"the text has {len(context)} tokens and the model reads {most}, thought and answer ({room}) included")
    if position is not None and not 0 <= position < len(context):
        raise WorkbookError(f"token {position} is not in the text, whose tokens are 0 to {len(context) - 1}")
    return context
