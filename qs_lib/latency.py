"""Latency and memory of a forward pass with thoughts, measured side by side with its alternatives."""

import ctypes
import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .model import QuietStarForCausalLM
from .thoughts.attention import LanguageHead
from .thoughts.sampler import sample

RANDOM_MODELS = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "10M": (256, 704, 10, 8, 4, 8192),
    "30M": (512, 1408, 8, 8, 4, 16384),
    "100M": (768, 2048, 12, 12, 4, 32000),
}
SETTINGS = ((1, 1, 16), (1, 4, 16), (1, 4, 28), (8, 4, 16))  # positions, thoughts per position, tokens per thought


@dataclass
class LatencyReport:
    """``rows``: one dict per setting (positions, num_thoughts, thought_length, median_ms, p95_ms, meets); ``median_ms``,
    ``p95_ms``: the default setting; ``parallel_speedup``: the default thoughts at **one** position (the last), drawn by
    ``generate`` one after the other / all at once, medians of runs in turn; ``parallel_speedup_all``: the same with thoughts
    at every position of the text; ``memory_overhead``: (peak with thoughts - peak of a plain forward pass) / what the plain pass adds to the process
    at rest, None where the system cannot tell; ``plain_ms``: reading the text once, which is all the set-up there is."""

    rows: list[dict]
    median_ms: float
    p95_ms: float
    plain_ms: float
    parallel_speedup: float
    parallel_speedup_all: float
    memory_overhead: float | None
    target_ms: float

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def measure_latency(model, input_ids, positions=(1, 4), num_thoughts=(1, 4, 8), thought_lengths=(16, 28),
                    repeats: int = 20, target_ms: float = 200.0) -> LatencyReport:
    """Time a :class:`QuietStarForCausalLM` on one text, ``input_ids`` (1, L): every combination of thinking positions
    (the last so many), thoughts per position and tokens per thought, interleaved, ``repeats`` times after a warm-up.

    A forward pass with thoughts reads the text, samples the thoughts, reads the states after them and mixes. The default
    setting is the model's configuration at the last position. Thoughts may end early.
    """
    model.eval()
    input_ids = input_ids.to(model.device)
    c, length = model.config, input_ids.shape[1]
    grid = [(p, n, t) for p in positions for n in num_thoughts for t in thought_lengths if p <= length]
    default = (1, c.num_thoughts, c.thought_length)
    grid += [] if default in grid else [default]
    times = {setting: [] for setting in grid}
    plain, one_by_one, together, every_alone, every_together = [], [], [], [], []
    settings = {"num_thoughts": c.num_thoughts, "thought_length": c.thought_length}
    last = torch.tensor([[length - 1]], device=input_ids.device)
    some = range(length // 10, length, max(1, length // 5))  # an even selection of positions stands for all
    for repeat in tqdm(range(repeats + 1), desc="latency"):
        timed = {s: _ms(lambda s=s: forward_with_thoughts(model, input_ids, *s)) for s in grid}
        bare = _ms(lambda: model.lm(input_ids=input_ids, logits_to_keep=1))
        side = _ms(lambda: model.think(input_ids, None, last, temperature=1.0, **settings, with_hidden=False))
        alone = sum(_ms(lambda: generate_alone(model, input_ids)) for _ in range(c.num_thoughts))
        everywhere = _ms(lambda: model.think(input_ids, temperature=1.0, **settings, with_hidden=False))
        each = sum(_ms(lambda p=p: generate_alone(model, input_ids[:, : p + 1])) for p in some)
        if repeat == 0:
            continue  # warm-up
        for s, ms in timed.items():
            times[s].append(ms)
        plain.append(bare)
        together.append(side)
        one_by_one.append(alone)
        every_together.append(everywhere)
        every_alone.append(each * c.num_thoughts * length / len(some))
    rows = [
        {"positions": p, "num_thoughts": n, "thought_length": t, "median_ms": float(np.median(v)),
         "p95_ms": float(np.quantile(v, 0.95)), "meets": bool(np.quantile(v, 0.95) < target_ms)}
        for (p, n, t), v in times.items()
    ]  # fmt: skip
    return LatencyReport(
        rows, float(np.median(times[default])), float(np.quantile(times[default], 0.95)), float(np.median(plain)),
        float(np.median(one_by_one) / np.median(together)), float(np.median(every_alone) / np.median(every_together)),
        memory_overhead(model, input_ids), target_ms,
    )  # fmt: skip


def forward_with_thoughts(model, input_ids, positions: int, num_thoughts: int, thought_length: int):
    """Mixed next-token log-probs (1, positions, vocab) at the last ``positions`` tokens."""
    at = torch.arange(input_ids.shape[1] - positions, input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    thoughts = model.think(input_ids, None, at, num_thoughts=num_thoughts, thought_length=thought_length)
    base = model._read(model.lm, input_ids, None)[:, -positions:]
    return model.mix(base, thoughts.hidden)


def generate_alone(model, input_ids):
    """One thought by the library's own ``generate`` with a cache: what parallel thoughts are compared with.

    It samples as many tokens as ours at most; neither reads ``</think>`` after them.
    """
    c = model.config
    start = torch.cat([input_ids, torch.tensor([[c.think_token_id]], device=input_ids.device)], 1)
    return model.lm.generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=c.thought_length - 2, eos_token_id=c.end_think_token_id, pad_token_id=c.end_think_token_id,
    )  # fmt: skip


def random_model(name: str) -> QuietStarForCausalLM:
    """A Llama with random weights and tied embeddings from :data:`RANDOM_MODELS`: what size costs, whatever it says."""
    hidden, inner, layers, heads, key_heads, size = RANDOM_MODELS[name]
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=size, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        pad_token_id=0,
    ))  # fmt: skip
    lm.config.think_token_id, lm.config.end_think_token_id = 1, 2
    return QuietStarForCausalLM.from_base(lm)


@torch.no_grad()
def measure_models(names, lengths=(64, 256), settings=SETTINGS, repeats: int = 3, seconds: float = 20.0,
                   target_ms: float = 200.0) -> list[dict]:
    """Time random models of several sizes (``names`` of :data:`RANDOM_MODELS`) on random texts of ``lengths`` tokens.

    Every setting (positions, thoughts, tokens per thought) takes its turn; after ``repeats`` rounds they go on until
    ``seconds`` have passed for the model. Random weights end almost no thought early, so these are worst cases.

    Returns one dict per model, text length and setting: parameters, repeats, median_ms, p95_ms, plain_ms (reading the
    text once), meets (95th percentile below the target) and shares of the median (they add up to 1): ``reading`` the
    text, twice as the mixing needs its plain prediction too; ``sampling``: the output head and the draw of each token;
    ``mixing``; ``steps``: the rest, one pass of all thoughts per token.
    """
    rows = []
    for name in tqdm(names, desc="models"):
        model = random_model(name)
        texts = {n: torch.randint(3, model.config.vocab_size, (1, n)) for n in lengths}
        grid = [(n, *setting) for n in lengths for setting in settings if setting[0] <= n]
        times, plain = {key: [] for key in grid}, {n: [] for n in lengths}
        forward_with_thoughts(model, texts[lengths[0]], 1, 1, 4)  # warm-up, and the check of a model new to the engine
        start = time.perf_counter()
        while len(times[grid[0]]) < repeats or time.perf_counter() - start < seconds:
            for n, ids in texts.items():
                plain[n].append(_ms(model._read, model.lm, ids, None))
            for n, *setting in grid:
                times[n, *setting].append(_ms(forward_with_thoughts, model, texts[n], *setting))
        for key in grid:
            n, positions, num_thoughts, thought_length = key
            median, p95 = float(np.median(times[key])), float(np.quantile(times[key], 0.95))
            rows.append({
                "model": name, "parameters": sum(p.numel() for p in model.lm.parameters()), "text_length": n,
                "positions": positions, "num_thoughts": num_thoughts, "thought_length": thought_length,
                "repeats": len(times[key]), "median_ms": median, "p95_ms": p95, "plain_ms": float(np.median(plain[n])),
                "meets": p95 < target_ms,
                "shares": shares(model, median, float(np.median(plain[n])), positions, num_thoughts, thought_length),
            })  # fmt: skip
    return rows


@torch.no_grad()
def shares(model, total_ms: float, plain_ms: float, positions: int, num_thoughts: int, thought_length: int) -> dict:
    """What a forward pass of ``total_ms`` is made of; see :func:`measure_models`."""
    head, size = LanguageHead(model.lm), model.config.hidden_size
    states = torch.randn(positions * num_thoughts, size, dtype=model.lm.dtype)
    base, uniform = states[None, :positions], torch.rand(len(states))

    def median(work):
        return float(np.median([_ms(work) for _ in range(4)][1:]))

    parts = {
        "reading": 2 * plain_ms,
        "sampling": (thought_length - 2) * median(lambda: sample(head(states), uniform)),
        "mixing": median(lambda: model.mix(base, states.view(1, positions, num_thoughts, size))),
    }
    total_ms = max(total_ms, sum(parts.values()))  # parts timed in a busy moment may exceed the whole
    found = {part: ms / total_ms for part, ms in parts.items()}
    return found | {"steps": 1 - sum(found.values())}


def memory_overhead(model, input_ids, resolution: int = 2**20) -> float | None:
    """Extra peak memory of a pass with the default thoughts over a plain forward pass, as a share of what the plain pass
    adds to the resting process; None where that is less than ``resolution`` bytes (a tiny model on a short text is not
    seen by the system's accounting) or the kernel does not report a resettable peak."""
    def plain():
        model.lm(input_ids=input_ids)

    def with_thoughts():
        forward_with_thoughts(model, input_ids, 1, model.config.num_thoughts, model.config.thought_length)

    extra = [_extra_bytes(f, model.device) for f in (plain, with_thoughts)]
    return None if None in extra or extra[0] < resolution else (extra[1] - extra[0]) / extra[0]


def _extra_bytes(work, device) -> int | None:
    """Peak memory while ``work`` runs, above what is held at rest: a GPU's own count, or the process's resident memory
    (Linux: VmHWM, reset by clear_refs)."""
    work()
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the pass would run inside it unseen
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        work()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":"))


def _ms(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # it runs behind
    return 1000 * (time.perf_counter() - start)
