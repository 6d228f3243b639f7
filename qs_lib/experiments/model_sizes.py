"""What thoughts cost on larger models with fresh weights: the rows of notebook 07."""

import time

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from ..evaluation.latency import forward_with_thoughts, milliseconds
from ..model import QuietStarForCausalLM
from ..thoughts.attention import LanguageHead
from ..thoughts.sampler import sample

RANDOM_MODELS = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "10M": (256, 704, 10, 8, 4, 8192),
    "30M": (512, 1408, 8, 8, 4, 16384),
    "100M": (768, 2048, 12, 12, 4, 32000),
}
# positions, thoughts per position, tokens per thought
THOUGHT_SETTINGS = ((1, 1, 16), (1, 4, 16), (1, 4, 28), (8, 4, 16))


def random_model(name: str) -> QuietStarForCausalLM:
    """Return a Llama of a size of :data:`RANDOM_MODELS` with random weights and tied embeddings."""
    hidden, inner, layers, heads, key_heads, vocabulary = RANDOM_MODELS[name]
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "tie_word_embeddings": True}
    lm = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    lm.config.think_token_id, lm.config.end_think_token_id = 1, 2
    return QuietStarForCausalLM.from_base(lm)


@torch.no_grad()
def measure_models(
    names, lengths=(64, 256), settings=THOUGHT_SETTINGS, repeats: int = 3, seconds: float = 20.0, target_ms=200.0
) -> list[dict]:
    """Time random models of several sizes (``names`` of :data:`RANDOM_MODELS`) on random texts of ``lengths`` tokens.

    Every setting (positions, thoughts, tokens per thought) takes its turn. After ``repeats`` rounds they go on until
    ``seconds`` have passed for the model. Random weights end almost no thought early, so these are worst cases.

    Returns one dict per model, text length and setting: parameters, repeats, median_ms, p95_ms, plain_ms (reading the
    text once), meets (95th percentile below the target) and :func:`shares` of the median.
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
                plain[n].append(milliseconds(model.read, ids))
            for n, *setting in grid:
                times[n, *setting].append(milliseconds(forward_with_thoughts, model, texts[n], *setting))
        parameters = sum(p.numel() for p in model.lm.parameters())
        for (n, *setting), taken in times.items():
            median, p95, plain_ms = map(float, (np.median(taken), np.quantile(taken, 0.95), np.median(plain[n])))
            row = {"model": name, "parameters": parameters, "text_length": n}
            row |= dict(zip(("positions", "num_thoughts", "thought_length"), setting, strict=True))
            row |= {"repeats": len(taken), "median_ms": median, "p95_ms": p95, "plain_ms": plain_ms}
            rows.append(row | {"meets": p95 < target_ms, "shares": shares(model, median, plain_ms, *setting)})
    return rows


@torch.no_grad()
def shares(model, total_ms: float, plain_ms: float, positions: int, num_thoughts: int, thought_length: int) -> dict:
    """Return what a forward pass of ``total_ms`` is made of, as shares that add up to 1.

    ``reading``: the text, twice as the mixing needs its plain prediction too. ``sampling``: the output head and the
    draw of each token. ``mixing``. ``steps``: the rest, one pass of all thoughts per token.
    """
    head, size = LanguageHead(model.lm), model.config.hidden_size
    states = torch.randn(positions * num_thoughts, size, dtype=model.lm.dtype)
    base, uniform = states[None, :positions], torch.rand(len(states))

    def median(work):
        return float(np.median([milliseconds(work) for _ in range(4)][1:]))

    parts = {"reading": 2 * plain_ms}
    parts["sampling"] = (thought_length - 2) * median(lambda: sample(head(states), uniform))
    parts["mixing"] = median(lambda: model.mix(base, states.view(1, positions, num_thoughts, size)))
    total_ms = max(total_ms, sum(parts.values()))  # parts timed in a busy moment may exceed the whole
    found = {part: ms / total_ms for part, ms in parts.items()}
    return found | {"steps": 1 - sum(found.values())}
