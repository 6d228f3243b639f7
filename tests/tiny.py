"""A random model small enough to run in milliseconds, with the pocket task's tokenizer and the eight tokens."""

from functools import cache

import qs_lib as qs
from qs_lib.champion import build_champion, build_tokenizer
from qs_lib.data import pocket
from qs_lib.model import QuietStarForCausalLM


def tiny_champion(architecture="llama", seed=0):
    tokenizer = build_tokenizer("pocket", [])
    model = build_champion(tokenizer, architecture, hidden_size=32, layers=2, heads=2, intermediate_size=48, seed=seed)
    return model.eval(), tokenizer


def tiny_lm(architecture="llama", seed=0):
    return qs.add_thinking_tokens(*tiny_champion(architecture, seed))


def tiny_quiet_star(seed=0, **settings):
    model, tokenizer = tiny_lm(seed=seed)
    settings = {"num_thoughts": 3, "thought_length": 8, "n_true": 3} | settings
    return QuietStarForCausalLM.from_base(model, tokenizer, **settings), tokenizer


@cache
def problems(split="train", size=24):
    return pocket.generate(split, size, seed=3)
