"""Latency and memory of a forward pass with thoughts, measured side by side with its alternatives."""

import ctypes
import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm


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
def measure_latency(
    model,
    input_ids,
    positions=(1, 4),
    num_thoughts=(1, 4, 8),
    thought_lengths=(16, 28),
    repeats: int = 20,
    target_ms: float = 200.0,
) -> LatencyReport:
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
        {
            "positions": p,
            "num_thoughts": n,
            "thought_length": t,
            "median_ms": float(np.median(v)),
            "p95_ms": float(np.quantile(v, 0.95)),
            "meets": bool(np.quantile(v, 0.95) < target_ms),
        }
        for (p, n, t), v in times.items()
    ]
    return LatencyReport(
        rows,
        float(np.median(times[default])),
        float(np.quantile(times[default], 0.95)),
        float(np.median(plain)),
        float(np.median(one_by_one) / np.median(together)),
        float(np.median(every_alone) / np.median(every_together)),
        memory_overhead(model, input_ids),
        target_ms,
    )


def forward_with_thoughts(model, input_ids, positions: int, num_thoughts: int, thought_length: int):
    """Mixed next-token log-probs (1, positions, vocab) at the last ``positions`` tokens."""
    at = torch.arange(input_ids.shape[1] - positions, input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    thoughts = model.think(input_ids, None, at, num_thoughts=num_thoughts, thought_length=thought_length)
    base = model.read(input_ids)[:, -positions:]
    return model.mix(base, thoughts.hidden)


def generate_alone(model, input_ids):
    """One thought by the library's own ``generate`` with a cache: what parallel thoughts are compared with.

    It samples as many tokens as ours at most; neither reads ``</think>`` after them.
    """
    c = model.config
    start = torch.cat([input_ids, torch.tensor([[c.think_token_id]], device=input_ids.device)], 1)
    return model.lm.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=c.thought_length - 2,
        eos_token_id=c.end_think_token_id,
        pad_token_id=c.end_think_token_id,
    )


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
