"""Side-by-side cost of generating and re-scoring thoughts; writes a JSON file and prints the same as a table.

    python tests/benchmarks/bench_thoughts.py [outputs/bench/thoughts.json] [--only NAME ...] [--quick]

One thread, CPU seconds of the process (not wall time), random weights, medians of interleaved repetitions. The
methods beside ours: `generate` of transformers with left-padded rows of similar length; the dense diagonal mask
over all positions, with our sampler; one thought at a time with a cache. The slow ones run on an even selection of
rows or positions and are scaled up; "share" says how much ran. `generate` returns no log-probs and no state.
"""

import argparse
import copy
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from qs_lib.prefix import Grid
from qs_lib.sampler import sample, uniforms
from qs_lib.thoughts import generate_thoughts, rescore_thoughts

THINK, END = 1, 2
MODELS = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "tiny": (64, 128, 2, 2, 1, 256),
    "1M": (128, 384, 4, 4, 2, 1024),
    "10M": (256, 704, 10, 8, 4, 8192),
    "100M": (768, 2048, 12, 12, 4, 32000),
}
SHAPES = {  # model, batch, length, positions (None: all), thoughts, thought length
    "1M_L64": ("1M", 4, 64, None, 4, 10),
    "1M_L256": ("1M", 4, 256, None, 4, 16),
    "1M_L512": ("1M", 1, 512, None, 4, 16),
    "1M_L1024": ("1M", 1, 1024, None, 4, 16),
    "10M_L64": ("10M", 4, 64, None, 4, 10),
    "10M_L256": ("10M", 1, 256, None, 4, 16),
    "10M_L256_M8": ("10M", 4, 256, 8, 4, 16),
    "100M_L64": ("100M", 1, 64, None, 4, 10),
}
LATENCY = {"10M_L64_N1": ("10M", 1, 64, 1, 1, 10), "10M_L64_N4": ("10M", 1, 64, 1, 4, 10)}
RESCORE = {
    "1M_L64": ("1M", 4, 64, None, 4, 10), "10M_L64": ("10M", 4, 64, None, 4, 10),
    "1M_L256": ("1M", 1, 256, None, 4, 16), "10M_L256_M8": ("10M", 4, 256, 8, 4, 16),
}
MEMORY = ("10M", 1, 256, None, 4, 16)
N_TRUE = 4


def build(name):
    hidden, inner, layers, heads, key_heads, size = MODELS[name]
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=size, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )).eval()


def texts(model, batch, length, positions):
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    if positions is None:
        return ids, None
    step = length // positions
    return ids, torch.arange(step - 1, length, step).expand(batch, -1)


def ours(model, ids, positions, number, length, **options):
    # The random model would end some thoughts early; END cannot win against these logits.
    return generate_thoughts(
        model, ids, None, positions, number, length, generator=torch.Generator().manual_seed(0), think_id=THINK,
        end_id=END, **options,
    )


def plain_forward(model, length=256):
    ids = torch.full((4, length), 5)
    with torch.no_grad():
        model(ids, use_cache=False)
    return ids.numel()


def units(ids, positions):
    """All (row, position) pairs, longest text last."""
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    pairs = [(row, int(p)) for row in range(len(ids)) for p in positions[row]]
    return sorted(pairs, key=lambda pair: pair[1])


def left_padded(ids, pairs):
    width = pairs[-1][1] + 2
    rows, mask = torch.zeros(len(pairs), width, dtype=torch.long), torch.zeros(len(pairs), width, dtype=torch.long)
    for i, (row, p) in enumerate(pairs):
        rows[i, width - p - 2 : -1], rows[i, -1] = ids[row, : p + 1], THINK
        mask[i, width - p - 2 :] = 1
    return rows, mask


@torch.no_grad()
def by_generate(model, ids, positions, number, length, rows, every=1):
    """transformers' generate, `rows` sequences at a time; every: only each so-many-th batch. Returns the share."""
    pairs, size = units(ids, positions), max(1, rows // number)
    starts = list(range(0, len(pairs), size))
    chosen = starts[every // 2 :: every] or starts[-1:]
    for start in chosen:
        inputs, mask = left_padded(ids, pairs[start : start + size])
        model.generate(
            inputs, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=number,
            max_new_tokens=length - 2, min_new_tokens=length - 2, pad_token_id=0,
        )
    return len(chosen) / len(starts)


@torch.no_grad()
def one_by_one(model, ids, positions, number, length, count=6):
    pairs = units(ids, positions)
    step = max(1, len(pairs) // count)
    chosen = pairs[step // 2 :: step]
    for row, p in chosen:
        cache, tokens = DynamicCache(), torch.cat([ids[row : row + 1, : p + 1], torch.tensor([[THINK]])], 1)
        for t in range(length - 1):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if t < length - 2:
                tokens = torch.multinomial(logits.softmax(-1), 1)
            else:
                tokens = torch.tensor([[END]])
        model(tokens, past_key_values=cache, use_cache=True)
    return len(chosen) / (len(pairs) * number)


@torch.no_grad()
def dense(model, ids, number, length):
    """All positions with one mask over the text and every thought: position i sees text <= i and its own thought."""
    batch, size = ids.shape
    rows = ids.repeat_interleave(number, 0)
    eye = torch.full((size, size), -torch.inf).fill_diagonal_(0)
    mask = torch.full((size, size), -torch.inf).triu(1)
    cache = DynamicCache()
    model.model(rows, attention_mask=mask[None, None], past_key_values=cache, use_cache=True)
    row = torch.arange(batch).repeat_interleave(number * size)
    place = torch.arange(size).repeat(batch * number)
    thought = torch.arange(number).repeat_interleave(size).repeat(batch)
    uniform = uniforms(0, row, place + 1, thought, length)
    tokens = torch.full_like(rows, THINK)
    forbid = torch.tensor([THINK])
    for t in range(length):
        mask = torch.cat([mask, eye], 1)
        places = torch.arange(1, size + 1).unsqueeze(0) + t
        hidden = model.model(
            tokens, attention_mask=mask[None, None], position_ids=places, past_key_values=cache, use_cache=True
        ).last_hidden_state
        if t < length - 2:
            tokens, _ = sample(model.lm_head(hidden).flatten(0, 1), uniform[:, t + 1], forbid=forbid)
            tokens = tokens.view(rows.shape)
        else:
            tokens = torch.full_like(rows, END)
    return hidden


def rescore_ours(model, ids, thoughts):
    parts = range(0, thoughts.positions.shape[1], 64)
    for row in range(len(ids)):
        for start in parts:
            part = thoughts.part(slice(row, row + 1), slice(start, start + 64))
            result = rescore_thoughts(model, ids[row : row + 1], part, n_true=N_TRUE)
            (result.thought_logprobs.sum() + result.true_logprobs.sum()).backward()


def rescore_rows(model, ids, thoughts, every=1, rows=32):
    """Plain rows text + thought + true tokens, left-padded, `rows` at a time. Returns the share that ran."""
    number, length = thoughts.tokens.shape[2:]
    jobs = sorted(
        ((int(thoughts.positions[r, p]), r, p, n) for r in range(len(ids)) for p in range(thoughts.positions.shape[1])
         for n in range(number)),
    )
    starts = list(range(0, len(jobs), rows))
    chosen = starts[every // 2 :: every] or starts[-1:]
    tail = length + N_TRUE
    for start in chosen:
        sequences = [
            torch.cat([ids[r, : at + 1], thoughts.tokens[r, p, n], ids[r, at + 1 : at + 1 + N_TRUE]])
            for at, r, p, n in jobs[start : start + rows]
        ]
        # Texts that end early get other true tokens, so that all rows end in the same columns.
        sequences = [torch.cat([s, ids[0, : at + 1 + tail - len(s)]]) for s, (at, *_) in zip(
            sequences, jobs[start : start + rows])]
        width = max(map(len, sequences))
        batch = torch.stack([torch.cat([s.new_zeros(width - len(s)), s]) for s in sequences])
        mask = torch.stack([torch.arange(width) >= width - len(s) for s in sequences]).long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            batch, attention_mask=mask, position_ids=places, logits_to_keep=tail, use_cache=False
        ).logits[:, :-1]
        logits.log_softmax(-1).gather(-1, batch[:, 1 - tail :, None]).sum().backward()
    return len(chosen) / len(starts)


def cpu_seconds(run, *arguments, **options):
    start = time.process_time()
    share = run(*arguments, **options)
    return (time.process_time() - start) / (share if isinstance(share, float) else 1.0), share


def medians(jobs, repeats):
    """jobs: name -> call. Interleaved; the first round only warms up. Returns seconds and what the calls returned."""
    times, shares = {name: [] for name in jobs}, {}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            seconds, shares[name] = cpu_seconds(job)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}, shares


def generation(name, shape, repeats):
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    ids, where = texts(model, batch, size, positions)
    count = batch * (positions or size) * number
    every = max(1, count // number // 8 // 8)
    half = copy.deepcopy(model).to(torch.bfloat16)
    jobs = {
        "ours": lambda: ours(model, ids, where, number, length),
        "ours_tokens_only": lambda: ours(model, ids, where, number, length, with_hidden=False),
        "ours_256_streams": lambda: ours(model, ids, where, number, length, max_streams=256),
        "ours_bf16": lambda: ours(half, ids, where, number, length),
        "generate_32": lambda: by_generate(model, ids, where, number, length, 32, every),
        "generate_128": lambda: by_generate(model, ids, where, number, length, 128, max(1, every // 2)),
        "one_by_one": lambda: one_by_one(model, ids, where, number, length),
        "plain_4x256": lambda: plain_forward(model),
    }
    if positions is None:
        jobs["dense_mask"] = lambda: dense(model, ids, number, length)
    seconds, shares = medians(jobs, repeats)
    generate = min(seconds["generate_32"], seconds["generate_128"])
    mine, tokens = seconds["ours"], count * length
    flops = 2 * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    flops += 2 * model.lm_head.weight.numel() * (length - 2) / length
    result = {
        "shape": {"model": kind, "batch": batch, "length": size, "positions": positions or "all",
                  "thoughts": number, "thought_length": length},
        "cpu_seconds": seconds,
        "share_run": {n: s for n, s in shares.items() if isinstance(s, float)},
        "generate_over_ours": generate / mine,
        "generate_over_tokens_only": generate / seconds["ours_tokens_only"],
        "one_by_one_over_ours": seconds["one_by_one"] / mine,
        "thought_token_over_plain_token": mine / tokens / (seconds["plain_4x256"] / 1024),
        "bf16_token_over_plain_token": seconds["ours_bf16"] / tokens / (seconds["plain_4x256"] / 1024),
        "gflops_without_attention": flops * tokens / mine / 1e9,
    }
    if positions is None:
        result["dense_mask_over_ours"] = seconds["dense_mask"] / mine
    return result


def rescoring(name, shape, repeats):
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    ids, where = texts(model, batch, size, positions)
    thoughts = ours(model, ids, where, number, length)
    every = max(1, thoughts.lengths.numel() // 32 // 8)
    seconds, shares = medians({
        "ours": lambda: rescore_ours(model, ids, thoughts),
        "rows_32": lambda: rescore_rows(model, ids, thoughts, every),
    }, repeats)
    return {"cpu_seconds": seconds, "share_run": {"rows_32": shares["rows_32"]},
            "rows_over_ours": seconds["rows_32"] / seconds["ours"]}


def latency(name, shape, repeats):
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    ids, where = texts(model, batch, size, positions)
    seconds, _ = medians({
        "ours": lambda: ours(model, ids, where, number, length),
        "ours_tokens_only": lambda: ours(model, ids, where, number, length, with_hidden=False),
        "generate": lambda: by_generate(model, ids, where, number, length, number),
    }, 3 * repeats)
    return {"cpu_seconds": seconds, "ours_over_generate": seconds["ours"] / seconds["generate"],
            "tokens_only_over_generate": seconds["ours_tokens_only"] / seconds["generate"]}


def mask_setup(repeats):
    """Milliseconds to make all masks of one step at every position, 4 thoughts each, one row."""
    result = {}
    for size in (64, 256, 512, 1024):
        def make(size=size):
            limit = torch.arange(1, size + 1).repeat_interleave(4)
            grid = Grid(torch.zeros_like(limit), limit, limit, 256)
            for number in range(len(grid.tiles)):
                grid._tile(number, None, 0, torch.float32)
        result[str(size)] = 1000 * medians({"make": make}, 10 * repeats)[0]["make"]
    return result


def gemm_rate():
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / medians({"mm": lambda: (a @ a).sum()}, 9)[0]["mm"] / 1e9


def peak_megabytes(method, shape):
    """Peak resident memory of one call above the loaded model, in a fresh process."""
    call = [sys.executable, __file__, "--memory", method, "--shape", json.dumps(shape)]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def measure_memory(method, shape):
    kind, batch, size, positions, number, length = shape
    model = build(kind)
    ids, where = texts(model, batch, size, positions)
    jobs = {
        "plain_forward": lambda: plain_text(model, ids),
        "ours_32": lambda: ours(model, ids, where, number, length, max_streams=32),
        "ours_64": lambda: ours(model, ids, where, number, length, max_streams=64),
        "ours_256": lambda: ours(model, ids, where, number, length, max_streams=256),
        "ours_1024": lambda: ours(model, ids, where, number, length),
        "dense_mask": lambda: dense(model, ids, number, length),
    }
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    jobs[method]()
    print(resident("VmHWM") - before)


def plain_text(model, ids):
    with torch.no_grad():
        model(ids, use_cache=False)


def memory(shape):
    names = ("plain_forward", "ours_32", "ours_64", "ours_256", "ours_1024", "dense_mask")
    peak = {name: peak_megabytes(name, shape) for name in names}
    weights = sum(p.numel() * p.element_size() for p in build(shape[0]).parameters()) / 2**20
    return {
        "above_the_model": peak, "weights": weights,
        "dense_mask_over_ours": {n: peak["dense_mask"] / peak[n] for n in names[1:5]},
        "with_weights_over_plain_forward": {
            n: (weights + peak[n]) / (weights + peak["plain_forward"]) for n in names[1:]},
    }


def show(title, table):
    print(f"\n{title}")
    for name, row in table.items():
        cells = row if isinstance(row, dict) else {"": row}
        flat = {k: v for k, v in cells.items() if isinstance(v, float)}
        flat |= {f"{k} s": v for k, v in cells.get("cpu_seconds", {}).items()}
        print(f"  {name:32s} " + "  ".join(f"{k} {v:.3g}" for k, v in flat.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="outputs/bench/thoughts.json")
    parser.add_argument("--only", nargs="*", help="names of shapes, or: memory, masks")
    parser.add_argument("--quick", action="store_true", help="a tiny model only, to see that the file runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if options.memory:
        return measure_memory(options.memory, options.shape)
    tiny = {"tiny": ("tiny", 2, 16, None, 2, 5)}
    shapes, rescore, fast, large = (tiny,) * 3 + (tiny["tiny"],) if options.quick else (
        SHAPES, RESCORE, LATENCY, MEMORY)

    def chosen(name):
        return not options.only or name in options.only

    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
              "torch": torch.__version__, "transformers": transformers.__version__,
              "repeats": options.repeats, "command": "make bench", "gemm_gflops": gemm_rate()}
    for title, job, table in (("generation", generation, shapes), ("rescoring", rescoring, rescore),
                              ("latency", latency, fast)):
        result[title] = {n: job(n, shape, options.repeats) for n, shape in table.items() if chosen(n)}
        show(title, result[title])
    if chosen("masks"):
        result["mask_setup_ms"] = mask_setup(options.repeats)
        show("mask set-up, ms", result["mask_setup_ms"])
    if chosen("memory"):
        result["peak_megabytes"] = memory(large)
        show("peak memory, MB", result["peak_megabytes"])
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
    path.with_suffix(".tmp").replace(path)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
