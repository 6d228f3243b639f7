"""Latency and memory of a forward pass with thoughts, measured side by side with its alternatives."""

import ctypes
import gc
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import WorkbookError, at_least


@dataclass
class LatencyReport:
    """What thoughts cost, times in milliseconds.

    ``rows``: one dict for each setting. ``median_ms`` and ``p95_ms``: those of the default setting. ``plain_ms``:
    reading the text once, which is all the set-up there is. ``parallel_speedup``: medians of the default thoughts at
    **one** position (the last), drawn by ``generate`` one after the other / all at once. ``parallel_speedup_all``: the
    same with thoughts at every position. ``memory_overhead``: (peak with thoughts - peak of a plain forward pass) /
    what the plain pass adds to the process at rest, None where the system cannot tell.
    """

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
def measure_latency(
    model, input_ids, positions=(1, 4), num_thoughts=(1, 4, 8), thought_lengths=(16, 28), repeats=20, target_ms=200.0
) -> LatencyReport:
    """Time a ``QuietStarForCausalLM`` on one text, ``input_ids (1, length)``.

    Every combination of thinking positions (the last so many), thoughts per position and tokens per thought takes its
    turn with the default setting and the alternatives, ``repeats`` times after a warm-up. The default setting is the
    model's configuration at the last position. A forward pass with thoughts reads the text, samples the thoughts, reads
    the states after them and mixes. Thoughts may end early.
    """
    at_least(1, positions=positions, num_thoughts=num_thoughts, repeats=repeats, tokens=input_ids.shape[1])
    at_least(2, thought_lengths=thought_lengths)
    if not target_ms > 0:
        raise WorkbookError(f"target_ms is {target_ms}; it must be above 0")
    model.eval()
    input_ids, length = input_ids.to(model.device), input_ids.shape[1]
    default = (1, model.config.num_thoughts, model.config.thought_length)
    grid = [(p, n, t) for p in positions for n in num_thoughts for t in thought_lengths if p <= length]
    grid += [] if default in grid else [default]
    some = range(length // 10, length, max(1, length // 5))  # an even selection of positions stands for all
    work = {setting: partial(forward_with_thoughts, model, input_ids, *setting) for setting in grid}
    settings = {"num_thoughts": default[1], "thought_length": default[2], "temperature": 1.0, "with_hidden": False}
    last = torch.tensor([[length - 1]], device=input_ids.device)

    def one_by_one(ends):
        for end in (end for end in ends for _ in range(default[1])):
            generate_alone(model, input_ids[:, :end])

    work |= {"plain": partial(model.lm, input_ids=input_ids, logits_to_keep=1)}
    work |= {"together": partial(model.think, input_ids, None, last, **settings)}
    work |= {"one by one": partial(one_by_one, [length])}
    work |= {"every together": partial(model.think, input_ids, **settings)}
    work |= {"every one by one": partial(one_by_one, [p + 1 for p in some])}
    times = {name: [] for name in work}
    for _ in tqdm(range(repeats + 1), desc="latency"):
        for name, one in work.items():
            times[name].append(milliseconds(one))
    median = {name: float(np.median(ms[1:])) for name, ms in times.items()}  # without the warm-up
    p95 = {name: float(np.quantile(ms[1:], 0.95)) for name, ms in times.items()}
    rows = []
    for setting in grid:
        row = dict(zip(("positions", "num_thoughts", "thought_length"), setting, strict=True))
        rows.append(row | {"median_ms": median[setting], "p95_ms": p95[setting], "meets": p95[setting] < target_ms})
    faster = median["one by one"] / median["together"]
    faster_all = median["every one by one"] * length / len(some) / median["every together"]
    times = median[default], p95[default], median["plain"]
    return LatencyReport(rows, *times, faster, faster_all, memory_overhead(model, input_ids), target_ms)


def forward_with_thoughts(model, input_ids, positions: int, num_thoughts: int, thought_length: int):
    """Return mixed next-token log-probs ``(1, positions, vocab)`` at the last ``positions`` tokens."""
    at = torch.arange(input_ids.shape[1] - positions, input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    thoughts = model.think(input_ids, None, at, num_thoughts=num_thoughts, thought_length=thought_length)
    return model.mix(model.read(input_ids)[:, -positions:], thoughts.hidden)


def generate_alone(model, input_ids):
    """Sample one thought, as long as ours at most, by the library's ``generate`` with a cache, for comparison."""
    c = model.config
    start = torch.cat([input_ids, torch.tensor([[c.think_token_id]], device=input_ids.device)], 1)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ends = {"eos_token_id": c.end_think_token_id, "pad_token_id": c.end_think_token_id}
    mask, room = torch.ones_like(start), c.thought_length - 2
    return model.lm.generate(input_ids=start, attention_mask=mask, max_new_tokens=room, **sampling, **ends)


def memory_overhead(model, input_ids, resolution: int = 2**20) -> float | None:
    """Return the extra peak memory of the default thoughts over a plain forward pass, as a share of that one's own.

    It is None where the plain pass adds less than ``resolution`` bytes to the resting process (the system does not see
    a tiny model on a short text), or where the kernel does not report a resettable peak.
    """
    default = (1, model.config.num_thoughts, model.config.thought_length)
    plain = _extra_bytes(partial(model.lm, input_ids=input_ids), model.device)
    thinking = _extra_bytes(partial(forward_with_thoughts, model, input_ids, *default), model.device)
    return None if None in (plain, thinking) or plain < resolution else (thinking - plain) / plain


def _extra_bytes(work, device) -> int | None:
    """Return the peak memory above rest while ``work`` runs, of the GPU or resident, None where nobody tells."""
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


def milliseconds(work, *arguments) -> float:
    """Return how long ``work(*arguments)`` takes."""
    start = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # it runs behind
    return 1000 * (time.perf_counter() - start)
