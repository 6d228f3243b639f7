"""Side-by-side cost of generating and re-scoring thoughts; prints bars and values, writes them to a JSON file.

    python tests/benchmarks/bench_thoughts.py [outputs/bench/thoughts.json] [--only NAME ...] [--repeats 3] [--quick]

One thread, CPU seconds of the process (not wall time), random weights, medians of repetitions. In each repetition every
model and shape is measured once and the methods take turns, after a short warm-up. Beside ours:

generate_32, generate_128: `generate` of transformers, so many rows at a time, rows of similar length, left-padded. The
    better of the two counts. It returns tokens alone, so it is held against `ours_tokens` (tokens and log-probs, not
    the state after </think>). "With states" is what the others are held against.
copied_prefix: what an expert builds by hand: the text read once (not counted), its cache copied to every thought's row.
dense_mask: all positions in one pass per step under the paper's diagonal mask, text and <think> read once, our sampler.
official: the same as the paper's code goes about it: a mask for every thought's row, the output head on every token,
    Gumbel-softmax, one-hot vectors times the embedding (memory only).
one_by_one: one thought at a time with a cache.
rows_8, rows_32 (re-scoring): text + thought + true tokens as plain rows. The better one counts.

Slow methods run on an even selection and are scaled by the share of their tokens that ran ("share_run"). After each
repetition the file is written with what there is; "repeats" says how many it holds, and an interrupted run continues.
"""

import argparse
import copy
import ctypes
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from qs_lib.files import write_bytes
from qs_lib.thoughts.generate import generate_thoughts
from qs_lib.thoughts.prefix import Grid
from qs_lib.thoughts.rescore import rescore_thoughts
from qs_lib.thoughts.sampler import sample, uniforms
from qs_lib.training.optim import CPU_FEATURES

THINK, END = 1, 2
CPU_HAS_BF16 = any(CPU_FEATURES.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
MODELS = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "tiny": (64, 128, 2, 2, 1, 256),
    "1M": (128, 384, 4, 4, 2, 1024),
    "10M": (256, 704, 10, 8, 4, 8192),
    "100M": (768, 2048, 12, 12, 4, 32000),
    "135M": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M's
}
SHAPES = {  # model, batch, length, positions (None: all), thoughts, thought length
    "10M_L64": ("10M", 4, 64, None, 4, 10),
    "10M_L256": ("10M", 1, 256, None, 4, 16),
    "1M_L256_M8": ("1M", 4, 256, 8, 4, 16),
    "1M_L512": ("1M", 1, 512, None, 4, 16),
    "1M_L1024": ("1M", 1, 1024, None, 4, 16),
    "135M_L96_M8": ("135M", 1, 96, 8, 4, 10),
}
LARGE = {"100M_L64": ("100M", 1, 64, None, 4, 10)}  # only when asked for with --only
RESCORE = {
    "1M_L64": ("1M", 1, 64, None, 4, 10),
    "10M_L64": ("10M", 1, 64, None, 4, 10),
    "1M_L256": ("1M", 1, 256, None, 4, 16),
    "10M_L256_M8": ("10M", 1, 256, 8, 4, 16),
}
LATENCY = {"10M_L64_N1": ("10M", 1, 64, 1, 1, 10), "10M_L64_N4": ("10M", 1, 64, 1, 4, 10)}
LATENCY |= {"135M_L64_N1": ("135M", 1, 64, 1, 1, 10), "135M_L64_N4": ("135M", 1, 64, 1, 4, 10)}
MEMORY = {"10M_L256": ("10M", 1, 256, None, 4, 16)}
PEAKS = ("plain_forward", "ours_32", "ours_64", "ours_256", "ours_1024", "generate_32", "dense_mask", "official")
N_TRUE = 4

# What was promised (bar) and what was hoped for (aim): claim, section, shape, value, direction, bound.
LINES = (
    ("bar", "generate / ours", "generation", "10M_L64", "generate_over_ours", ">=", 4),
    ("bar", "generate / ours", "generation", "10M_L256", "generate_over_ours", ">=", 7),
    ("bar", "generate / ours", "generation", "1M_L512", "generate_over_ours", ">=", 18),
    ("bar", "dense mask / ours", "generation", "10M_L64", "dense_mask_over_ours", ">=", 1.25),
    ("bar", "dense mask / ours", "generation", "10M_L256", "dense_mask_over_ours", ">=", 1.8),
    ("bar", "dense mask / ours", "generation", "1M_L512", "dense_mask_over_ours", ">=", 4),
    ("bar", "one by one / ours", "generation", "10M_L64", "one_by_one_over_ours", ">=", 25),
    ("bar", "one by one / ours", "generation", "10M_L256", "one_by_one_over_ours", ">=", 25),
    ("bar", "re-scoring, rows / ours", "rescoring", "1M_L64", "rows_over_ours", ">=", 2.3),
    ("bar", "re-scoring, rows / ours", "rescoring", "10M_L64", "rows_over_ours", ">=", 2.3),
    ("bar", "re-scoring, rows / ours", "rescoring", "1M_L256", "rows_over_ours", ">=", 5),
    ("bar", "re-scoring, rows / ours", "rescoring", "10M_L256_M8", "rows_over_ours", ">=", 5),
    ("bar", "thought token / plain token", "generation", "10M_L64", "token_over_plain_token", "<=", 1.15),
    ("bar", "thought token / plain token", "generation", "10M_L256", "token_over_plain_token", "<=", 1.15),
    ("bar", "mask set-up, ms", "masks", "L1024", "milliseconds", "<=", 5),
    ("bar", "peak memory, official mask / ours (256 streams)", "memory", "10M_L256", "official_over_ours_256", ">=", 5),
    ("bar", "peak memory, dense mask / ours (256 streams)", "memory", "10M_L256", "dense_mask_over_ours_256", ">=", 5),
    ("bar", "peak memory, dense mask / ours (64 streams)", "memory", "10M_L256", "dense_mask_over_ours_64", ">=", 5),
    ("bar", "peak memory, ours (32 streams) / plain forward", "memory", "10M_L256", "ours_32_over_plain", "<=", 1.33),
    ("aim", "generate / ours", "generation", "1M_L512", "generate_over_ours", ">=", 25),
    ("aim", "generate / ours", "generation", "1M_L1024", "generate_over_ours", ">=", 40),
    ("aim", "bfloat16 thought token / plain token", "generation", "10M_L64", "bf16_token_over_plain_token", "<=", 0.6),
    ("aim", "matrix products at full speed / ours, rate", "generation", "10M_L64", "roofline", "<=", 1.3),
    ("aim", "re-scoring, rows / ours", "rescoring", "1M_L256", "rows_over_ours", ">=", 8),
    ("aim", "one thought, ours / generate", "latency", "10M_L64_N1", "ours_over_generate", "<=", 1),
    ("seen", "generate / ours with states", "generation", "10M_L64", "generate_over_ours_with_states", "", None),
    ("seen", "generate / ours with states", "generation", "10M_L256", "generate_over_ours_with_states", "", None),
    ("seen", "generate / ours with states", "generation", "1M_L512", "generate_over_ours_with_states", "", None),
    ("seen", "copied prefix / ours", "generation", "10M_L64", "copied_prefix_over_ours", "", None),
    ("seen", "copied prefix / ours", "generation", "10M_L256", "copied_prefix_over_ours", "", None),
    ("seen", "copied prefix / ours", "generation", "1M_L512", "copied_prefix_over_ours", "", None),
    ("seen", "generate / ours, 8 positions", "generation", "1M_L256_M8", "generate_over_ours", "", None),
    (
        "seen",
        "peak memory, dense mask / ours (1024 streams)",
        "memory",
        "10M_L256",
        "dense_mask_over_ours_1024",
        "",
        None,
    ),
    ("seen", "four thoughts, generate / ours", "latency", "10M_L64_N4", "generate_over_ours", "", None),
    ("seen", "generate / ours, 8 positions", "generation", "135M_L96_M8", "generate_over_ours", "", None),
    ("seen", "copied prefix / ours, 8 positions", "generation", "135M_L96_M8", "copied_prefix_over_ours", "", None),
    ("seen", "one by one / ours, 8 positions", "generation", "135M_L96_M8", "one_by_one_over_ours", "", None),
    (
        "seen",
        "thought token / plain token, 8 positions",
        "generation",
        "135M_L96_M8",
        "token_over_plain_token",
        "",
        None,
    ),
    ("seen", "one thought, ours / generate", "latency", "135M_L64_N1", "ours_over_generate", "", None),
    ("seen", "four thoughts, generate / ours", "latency", "135M_L64_N4", "generate_over_ours", "", None),
)


def build(name):
    hidden, inner, layers, heads, key_heads, size = MODELS[name]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=size,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


def texts(model, batch, length, positions):
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    if positions is None:
        return ids, torch.arange(length).expand(batch, -1)
    step = length // positions
    return ids, torch.arange(step - 1, length, step).expand(batch, -1)


def ours(model, ids, positions, number, length, **options):
    # A random model ends few thoughts early; those stay in the batch until 15 % have ended, so nothing is saved.
    return generate_thoughts(
        model,
        ids,
        None,
        positions,
        number,
        length,
        generator=torch.Generator().manual_seed(0),
        think_id=THINK,
        end_id=END,
        **options,
    )


def units(ids, positions):
    """Return all (row, position) pairs, longest text last."""
    return sorted(((r, int(p)) for r in range(len(ids)) for p in positions[r]), key=lambda pair: pair[1])


def spread(items, kept):
    """Return the middles of `kept` equal parts of a list."""
    return [items[i] for i in sorted({(2 * k + 1) * len(items) // (2 * kept) for k in range(kept)})]


def batches(ids, positions, number, rows, kept, new):
    """`kept` batches of about `rows` rows, and the share of all tokens that is theirs; new: tokens a row is given."""
    pairs, size = units(ids, positions), max(1, rows // number)
    everything = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    chosen = spread(everything, kept)
    tokens = [sum(len(part) * (part[-1][1] + new) for part in parts) for parts in (chosen, everything)]
    return chosen, tokens[0] / tokens[1]


@torch.no_grad()
def by_generate(model, ids, positions, number, length, rows, kept):
    chosen, share = batches(ids, positions, number, rows, kept, length)
    for part in chosen:
        width = part[-1][1] + 2
        inputs, mask = torch.zeros(2, len(part), width, dtype=torch.long)
        for i, (row, p) in enumerate(part):
            inputs[i, width - p - 2 : -1], inputs[i, -1], mask[i, width - p - 2 :] = ids[row, : p + 1], THINK, 1
        model.generate(
            inputs,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=number,
            max_new_tokens=length - 2,
            min_new_tokens=length - 2,
            pad_token_id=0,
        )
    return share


@torch.no_grad()
def read(model, ids):
    cache = DynamicCache()
    model.model(ids, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def copied_prefix(model, text, ids, positions, number, length, rows, kept):
    chosen, share = batches(ids, positions, number, rows, kept, length)
    for part in chosen:
        width = part[-1][1] + 1
        row, limit = (torch.tensor(x).repeat_interleave(number) for x in zip(*part))
        limit = limit + 1
        cache = DynamicCache()
        for layer, kept_keys in enumerate(text.layers):
            cache.update(kept_keys.keys[row, :, :width], kept_keys.values[row, :, :width], layer)
        mask = (torch.arange(width) < limit.unsqueeze(1)).long()
        uniform = uniforms(0, row, limit, torch.arange(number).repeat(len(part)), length)
        tokens = torch.full((len(row), 1), THINK)
        for t in range(length):
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            hidden = model.model(
                tokens,
                attention_mask=mask,
                position_ids=(limit + t).unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            if t < length - 2:
                tokens = sample(model.lm_head(hidden), uniform[:, t + 1], forbid=torch.tensor([THINK]))[0].unsqueeze(1)
            else:
                tokens = torch.full_like(tokens, END)
    return share


@torch.no_grad()
def one_by_one(model, ids, positions, number, length, kept=6):
    pairs = units(ids, positions)
    chosen = spread(pairs, kept)
    for row, p in chosen:
        cache, tokens = DynamicCache(), torch.cat([ids[row : row + 1, : p + 1], torch.tensor([[THINK]])], 1)
        for t in range(length - 1):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if t < length - 2:
                tokens = torch.multinomial(logits.softmax(-1), 1)
            else:
                tokens = torch.tensor([[END]])
        model(tokens, past_key_values=cache, use_cache=True)
    done, everything = (sum(p + 1 + length for _, p in some) for some in (chosen, pairs))
    return done / (everything * number)


@torch.no_grad()
def dense(model, ids, number, length):
    """All positions with one mask over the text and every thought: position i sees text <= i and its own thought."""
    batch, size = ids.shape
    eye = torch.full((size, size), -torch.inf).fill_diagonal_(0)
    mask = torch.full((size, size), -torch.inf).triu(1)
    cache = DynamicCache()
    model.model(ids, attention_mask=mask[None, None], past_key_values=cache, use_cache=True)
    row = torch.arange(batch).repeat_interleave(number * size)
    place = torch.arange(size).repeat(batch * number)
    thought = torch.arange(number).repeat_interleave(size).repeat(batch)
    uniform = uniforms(0, row, place + 1, thought, length)
    tokens, forbid = torch.full_like(ids, THINK), torch.tensor([THINK])
    for t in range(length):
        mask = torch.cat([mask, eye], 1)
        places = torch.arange(1, size + 1).unsqueeze(0) + t
        hidden = model.model(
            tokens, attention_mask=mask[None, None], position_ids=places, past_key_values=cache, use_cache=True
        ).last_hidden_state
        if t < length - 2:
            logits = model.lm_head(hidden)
            if t == 0:
                cache.batch_repeat_interleave(number)
                logits = logits.repeat_interleave(number, 0)
            tokens = sample(logits.flatten(0, 1), uniform[:, t + 1], forbid=forbid)[0].view(batch * number, size)
        else:
            tokens = torch.full_like(tokens, END)


@torch.no_grad()
def official(model, ids, number, length):
    """`dense` with a mask per row of thoughts, all logits, Gumbel-softmax, one-hot inputs, as in the paper's code."""
    (batch, size), table = ids.shape, model.get_input_embeddings().weight
    eye = torch.full((batch * number, 1, size, size), -torch.inf)
    eye.diagonal(dim1=2, dim2=3).fill_(0)
    mask = torch.full((batch * number, 1, size, size), -torch.inf).triu(1)
    cache = DynamicCache()
    model(ids.repeat_interleave(number, 0), attention_mask=mask, past_key_values=cache, use_cache=True)
    inputs = torch.nn.functional.one_hot(torch.full((batch * number, size), THINK), len(table)).float()
    for t in range(length):
        mask = torch.cat([mask, eye], 3)
        places = torch.arange(1, size + 1).unsqueeze(0) + t
        logits = model(
            inputs_embeds=inputs @ table,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).logits
        inputs = torch.nn.functional.gumbel_softmax(logits, hard=True)


@torch.no_grad()
def plain_forward(model, ids):
    model(ids, use_cache=False)


def multiply(a):
    for _ in range(4):
        a @ a


def rescore_ours(model, ids, thoughts):
    for start in range(0, thoughts.positions.shape[1], 64):
        result = rescore_thoughts(model, ids, thoughts.part(slots=slice(start, start + 64)), n_true=N_TRUE)
        (result.thought_logprobs.sum() + result.true_logprobs.sum()).backward()


def rescore_rows(model, ids, thoughts, rows, kept):
    """Text + thought + true tokens of one text, left-padded, `rows` at a time."""
    number, length = thoughts.tokens.shape[2:]
    tail = length + N_TRUE
    jobs = [(p, i, n) for i, p in enumerate(thoughts.positions[0].tolist()) for n in range(number)]
    everything = [jobs[i : i + rows] for i in range(0, len(jobs), rows)]
    chosen = spread(everything, kept)
    for part in chosen:
        width = part[-1][0] + 1 + tail
        batch = torch.zeros(len(part), width, dtype=torch.long)
        for line, (p, i, n) in zip(batch, part):
            # Texts that end early get other true tokens, so that all rows end in the same columns.
            true = torch.cat([ids[0, p + 1 : p + 1 + N_TRUE], ids[0, :N_TRUE]])[:N_TRUE]
            line[width - p - 1 - tail :] = torch.cat([ids[0, : p + 1], thoughts.tokens[0, i, n], true])
        lengths = torch.tensor([p + 1 + tail for p, _, _ in part])
        mask = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()
        logits = model(
            batch,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=tail,
            use_cache=False,
        ).logits[:, :-1]
        logits.log_softmax(-1).gather(-1, batch[:, 1 - tail :, None]).sum().backward()
    tokens = [sum(len(part) * (part[-1][0] + 1 + tail) for part in parts) for parts in (chosen, everything)]
    return tokens[0] / tokens[1]


def timed(jobs, small, large, turns=1):
    """CPU seconds of jobs (name -> call of an input) on the large input, taking turns, after one call on the small one.

    A job that returns a float did that share of the work. Returns median seconds and shares.
    """
    times, shares = {name: [] for name in jobs}, {}
    for job in jobs.values():
        job(*small)
    for _ in range(turns):
        for name, job in jobs.items():
            start = time.process_time()
            share = job(*large)
            seconds = time.process_time() - start
            if isinstance(share, float):
                shares[name] = share
            times[name].append(seconds / shares.get(name, 1.0))
    return {"cpu_seconds": {name: statistics.median(found) for name, found in times.items()}, "share_run": shares}


def described(shape):
    kind, batch, size, positions, number, length = shape
    return {
        "model": kind,
        "batch": batch,
        "length": size,
        "positions": positions or "all",
        "thoughts": number,
        "thought_length": length,
    }


def generation(shape):
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    square, plain = torch.randn(1024, 1024), texts(model, 4, 256, 1)[0]
    small, large = (texts(model, 1, 16, None), texts(model, batch, size, positions))
    caches = {len(ids[0]): read(model, ids) for ids, _ in (small, large)}
    jobs = {
        "ours": lambda ids, at: ours(model, ids, at, number, length),
        "ours_tokens": lambda ids, at: ours(model, ids, at, number, length, with_hidden=False),
        "matrix_product": lambda *_: multiply(square),
        "plain_4x256": lambda *_: plain_forward(model, plain),
        "generate_32": lambda ids, at: by_generate(model, ids, at, number, length, 32, 4),
        "generate_128": lambda ids, at: by_generate(model, ids, at, number, length, 128, 1),
        "copied_prefix": lambda ids, at: copied_prefix(model, caches[len(ids[0])], ids, at, number, length, 128, 1),
        "one_by_one": lambda ids, at: one_by_one(model, ids, at, number, length),
    }
    if positions is None and size <= 512:
        jobs["dense_mask"] = lambda ids, _: dense(model, ids, number, length)
    if size == 64 and CPU_HAS_BF16:  # emulated it says nothing
        half = copy.deepcopy(model).to(torch.bfloat16)
        jobs["ours_bf16"] = lambda ids, at: ours(half, ids, at, number, length)
    return timed(jobs, small, large)


def generation_ratios(shape, seconds):
    kind, batch, size, positions, number, length = shape
    with torch.device("meta"):
        model = build(kind)
    flops = 2 * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    flops += 2 * model.lm_head.weight.numel() * (length - 2) / length
    mine, tokens = seconds["ours"], batch * (positions or size) * number * length
    rate, plain_token = 4 * 2 * 1024**3 / seconds["matrix_product"], seconds["plain_4x256"] / 1024
    found = {
        f"{name}_over_ours": seconds[name] / mine
        for name in ("copied_prefix", "one_by_one", "dense_mask")
        if name in seconds
    }
    if "ours_bf16" in seconds:
        found["bf16_token_over_plain_token"] = seconds["ours_bf16"] / tokens / plain_token
    return found | {
        "generate_over_ours": min(seconds["generate_32"], seconds["generate_128"]) / seconds["ours_tokens"],
        "generate_over_ours_with_states": min(seconds["generate_32"], seconds["generate_128"]) / mine,
        "token_over_plain_token": mine / tokens / plain_token,
        # Ours counts no attention, so this is a little worse than the truth.
        "roofline": rate / (flops * tokens / mine),
    }


def rescoring(shape):
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    small, large = (
        (ids, ours(model, ids, at, number, length))
        for ids, at in (texts(model, 1, 16, None), texts(model, batch, size, positions))
    )
    return timed(
        {
            "ours": lambda ids, thoughts: rescore_ours(model, ids, thoughts),
            "rows_8": lambda ids, thoughts: rescore_rows(model, ids, thoughts, 8, 4),
            "rows_32": lambda ids, thoughts: rescore_rows(model, ids, thoughts, 32, 2),
        },
        small,
        large,
    )


def rescoring_ratios(_, seconds):
    return {"rows_over_ours": min(seconds["rows_8"], seconds["rows_32"]) / seconds["ours"]}


def latency(shape):
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    given = texts(model, batch, size, positions)
    return timed(
        {
            "ours": lambda ids, at: ours(model, ids, at, number, length),
            "ours_tokens_only": lambda ids, at: ours(model, ids, at, number, length, with_hidden=False),
            "generate": lambda ids, at: by_generate(model, ids, at, number, length, number, 1),
        },
        given,
        given,
        turns=5,
    )


def latency_ratios(_, seconds):
    return {
        "ours_over_generate": seconds["ours"] / seconds["generate"],
        "generate_over_ours": seconds["generate"] / seconds["ours"],
        "tokens_only_over_generate": seconds["ours_tokens_only"] / seconds["generate"],
    }


def masks(size):
    """Making all masks of one step at every position, 4 thoughts each, one row."""

    def make(_):
        limit = torch.arange(1, size + 1).repeat_interleave(4)
        grid = Grid(torch.zeros_like(limit), limit, limit, 256)
        for number in range(len(grid.tiles)):
            grid._tile(number, None, 0, torch.float32)

    return timed({"make": make}, (0,), (0,), turns=10)


def mask_ratios(_, seconds):
    return {"milliseconds": 1000 * seconds["make"]}


def memory(shape):
    """Peak resident megabytes of one call above the loaded model, each in a process of its own."""
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    ids, at = texts(model, batch, size, positions)

    def run(method, ids, at):
        if method == "plain_forward":
            plain_forward(model, ids)
        elif method == "generate_32":
            by_generate(model, ids, at[:, -8:], number, length, 32, 1)  # the batch with the longest texts
        elif method == "dense_mask":
            dense(model, ids, number, length)
        elif method == "official":
            official(model, ids, number, length)
        else:
            ours(model, ids, at, number, length, max_streams=int(method.split("_")[1]))

    def child(pipe, method):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: what is freed goes back at once, so peaks are of live tensors
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        run(method, ids, at)
        pipe.send(resident("VmHWM") - before)

    for method in PEAKS:  # what a first call sets up once is no part of it
        run(method, ids[:, :8], at[:, :8])
    peak, forked = {}, multiprocessing.get_context("fork")
    for method in PEAKS:
        receiver, sender = forked.Pipe(duplex=False)
        process = forked.Process(target=child, args=(sender, method))
        process.start()
        peak[method] = receiver.recv()
        process.join()
    return {"megabytes_above_the_model": peak}


def memory_ratios(_, peak):
    return {
        **{f"{dense}_over_{name}": peak[dense] / peak[name] for dense in PEAKS[-2:] for name in PEAKS[1:5]},
        **{f"{name}_over_plain": peak[name] / peak["plain_forward"] for name in PEAKS[1:5]},
        "generate_over_ours_256": peak["generate_32"] / peak["ours_256"],
    }


def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def summary(shape, rounds, ratios):
    """Medians over the rounds of one shape, and the ratios of those medians."""
    (unit,) = {key for key in rounds[0] if key != "share_run"}
    medians = {name: statistics.median(r[unit][name] for r in rounds) for name in rounds[0][unit]}
    found = {"shape": described(shape)} if isinstance(shape, tuple) else {}
    return found | {unit: medians, "share_run": rounds[0].get("share_run", {})} | ratios(shape, medians)


def lines(result):
    """The promises beside what was measured; value and reached are None for what was not."""
    found = []
    for kind, claim, section, shape, key, direction, bound in LINES:
        value = result.get(section, {}).get(shape, {}).get(key)
        reached = None
        if value is not None and bound is not None:
            reached = value >= bound if direction == ">=" else value <= bound
        found.append(
            {
                "kind": kind,
                "claim": claim,
                "shape": shape,
                "direction": direction,
                "bound": bound,
                "value": value,
                "reached": reached,
            }
        )
    return found


def show(table):
    words = {True: "reached", False: "NOT REACHED", None: ""}
    print(f"\n{'':5} {'':47} {'shape':12} {'bound':>8} {'measured':>9}")
    for line in table:
        bound = "" if line["bound"] is None else f"{line['direction']} {line['bound']:g}"
        value = "not run" if line["value"] is None else f"{line['value']:.3g}"
        print(f"{line['kind']:5} {line['claim']:47} {line['shape']:12} {bound:>8} {value:>9} {words[line['reached']]}")


def conditions():
    root = Path(__file__).parents[2]
    sources = [Path(__file__), *sorted((root / "qs_lib" / "thoughts").glob("*.py"))]
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "command": "make bench",
        "unit": "CPU seconds of one thread, medians over repeats",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {'with' if CPU_HAS_BF16 else 'no'} bfloat16 instructions",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git.stdout.strip() or None,
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default="outputs/bench/thoughts.json")
    parser.add_argument("--only", nargs="*", help="names of shapes, or: generation rescoring latency masks memory")
    parser.add_argument("--quick", action="store_true", help="a tiny model only, to see that the file runs")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # Memory first, while this process is still small.
    sections = {
        "memory": (memory, memory_ratios, MEMORY),
        "masks": (masks, mask_ratios, {f"L{size}": size for size in (64, 256, 512, 1024)}),
        "latency": (latency, latency_ratios, LATENCY),
        "rescoring": (rescoring, rescoring_ratios, RESCORE),
        "generation": (generation, generation_ratios, SHAPES | (LARGE if options.only else {})),
    }
    if options.quick:
        tiny = {"tiny": ("tiny", 1, 16, None, 2, 5)}
        sections = {name: (*jobs, {"L16": 16} if name == "masks" else tiny) for name, (*jobs, _) in sections.items()}
    elif options.only:
        sections = {
            section: (*jobs, {n: s for n, s in shapes.items() if {section, n} & set(options.only)})
            for section, (*jobs, shapes) in sections.items()
        }
    else:
        print("about twenty minutes on an idle core")
    work = [(section, name) for section, (*_, shapes) in sections.items() for name in shapes]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(f".{options.output.name}.partial")
    now, done = conditions(), json.loads(partial.read_text()) if partial.exists() else {}
    if done.get("code") != now["code"]:
        done = now | {"rounds": {}}
    rounds = done["rounds"]
    with tqdm(total=options.repeats * len(work), file=sys.stderr) as bar:
        for number in range(1, options.repeats + 1):
            for section, name in work:
                bar.set_description(f"{section} {name}")
                measure, _, shapes = sections[section]
                found = rounds.setdefault(f"{section} {name}", [])
                if len(found) < number:
                    found.append(measure(shapes[name]))
                    write_bytes(partial, json.dumps(done).encode())
                bar.update()
            result = now | {"repeats": number}
            for section, name in work:
                _, ratios, shapes = sections[section]
                result.setdefault(section, {})[name] = summary(
                    shapes[name], rounds[f"{section} {name}"][:number], ratios
                )
            result["lines"] = lines(result)
            write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
    partial.unlink()
    show(result["lines"])
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
