"""Cheats to plant in the anti-theater checks. Each must turn the verdict red, or the checks are theater themselves."""

import copy
from functools import partial

import torch

from ..data import Problem
from ..data.tokens import encode_context, encode_reply, padded, thinking_ids
from ..errors import WorkbookError
from ..model import QuietStarForCausalLM
from .coherence import Coherence

CHEATS = {
    "unused": "thoughts are drawn and shown, and the answer ignores them",
    "random": "coherence is a random number",
    "frozen": "training never moved the model: it thinks as it did before",
    "copied": "every thought repeats words of the question",
    "repeated": "every thought is the answer the model would have given anyway",
    "leaked": "the harness writes the true answer into every thought",
    "seen": "the problems are training problems",
}


def plant(cheat: str, honest: dict, training_problems: list[Problem], seed: int = 0) -> dict:
    """Return a copy of ``anti_theater``'s arguments ``honest`` with a cheat planted. Raises ``WorkbookError``."""
    model, tokenizer, problems = honest["model"], honest["tokenizer"], honest["problems"]
    if cheat not in ("honest", *CHEATS):
        raise WorkbookError(f"unknown cheat {cheat!r}; known: {', '.join(CHEATS)}")
    if cheat == "unused":
        shut = QuietStarForCausalLM.from_base(model.lm, tokenizer, mixing=model.config.mixing)
        return honest | {"model": shut, "weights": "head"}
    if cheat == "frozen":
        return honest | {"model": honest["before"], "weights": "thoughts"}
    # "copied" takes of a question what fits of its end
    planted = {
        "random": {"score": partial(random_score, torch.Generator().manual_seed(seed))},
        "copied": {"think": forged(model, lambda texts, room: [text[-room:] for text in texts])},
        "repeated": {"think": forged(model, partial(direct_words, model, tokenizer))},
        "leaked": {"think": leaked(model, tokenizer, problems)},
        "seen": {"problems": training_problems[: len(problems)]},
    }
    return honest | planted.get(cheat, {})


def random_score(generator, tokenizer, input_ids, thoughts, *rest) -> Coherence:
    """Score the coherence of thoughts without a look at them."""
    return Coherence(*torch.rand(4, *thoughts.lengths.shape, generator=generator), raw={})


def leaked(model, tokenizer, problems: list[Problem]):
    """Return a sampler that draws the model's own thoughts and writes the true answer over the end of each."""
    truth = {p["question"]: encode_reply(tokenizer, p["answer"]) for p in problems}
    answers = {tuple(encode_context(tokenizer, question)): ids for question, ids in truth.items()}

    def think(ids, mask, positions, generator=None, **settings):
        thoughts = model.think(ids, mask, positions, generator, **settings)
        thoughts.tokens = thoughts.tokens.clone()
        for row, (text, at) in enumerate(zip(ids.tolist(), positions[:, 0].tolist(), strict=True)):
            answer = answers[tuple(text[: at + 1])]
            for k, length in enumerate(thoughts.lengths[row, 0].tolist()):
                start = max(1, length - 1 - len(answer))
                thoughts.tokens[row, 0, k, start : length - 1] = torch.tensor(answer[: length - 1 - start])
        return thoughts

    return think


def forged(model, words):
    """Return a sampler whose thoughts are ``words(texts, room)``, one list of ids for each text."""

    def think(ids, mask, positions, generator=None, **settings):
        thoughts = copy.copy(model.think(ids, mask, positions, generator, **settings))
        room = thoughts.tokens.shape[-1] - 2
        texts = [row[: p + 1].tolist() for row, p in zip(ids, positions[:, 0].tolist(), strict=True)]
        thoughts.tokens = torch.full_like(thoughts.tokens, thoughts.end_id)
        thoughts.tokens[..., 0] = thoughts.think_id
        thoughts.lengths = thoughts.lengths.clone()
        for b, inner in enumerate(words(texts, room)):
            thoughts.tokens[b, :, :, 1 : 1 + len(inner)] = torch.tensor(inner, dtype=torch.long)
            thoughts.lengths[b] = len(inner) + 2
        place = torch.arange(thoughts.tokens.shape[-1], device=thoughts.tokens.device)
        thoughts.sampled = (place < thoughts.lengths.unsqueeze(-1)) & (place > 0)
        thoughts.logprobs = torch.zeros_like(thoughts.logprobs)
        return thoughts

    return think


@torch.no_grad()
def direct_words(model, tokenizer, texts: list[list[int]], room: int) -> list[list[int]]:
    """Return the greedy continuation of each text (ids) without a thought, up to end-of-text."""
    ids, mask = padded(tokenizer, texts, model.lm.device, "left")
    end = tokenizer.eos_token_id
    ids_of = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end, "suppress_tokens": thinking_ids(tokenizer)}
    written = model.lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, **ids_of)
    return [row[: row.index(end)] if end in row else row for row in written[:, ids.shape[1] :].tolist()]
