"""Checks that a reader can watch: the thought engine against plain forward passes, and what each token reads."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, SuppressTokensLogitsProcessor

from .fallback import new_cache
from .rescore import rescore_thoughts


@torch.no_grad()
def one_by_one(model, text: list[int], thought_length: int, think_id: int, end_id: int) -> list[int]:
    """Return one greedy thought after ``text`` by plain ``generate``: what the parallel engine has to reproduce."""
    ids = torch.tensor([[*text, think_id]], device=model.device)
    settings = {"max_new_tokens": thought_length - 2, "do_sample": False}
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor([think_id])])
    settings |= {"eos_token_id": end_id, "pad_token_id": end_id, "logits_processor": processors}
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(text) :].tolist()
    return written if written[-1] == end_id else [*written, end_id]


@torch.no_grad()
def largest_difference(model, input_ids: torch.Tensor, thoughts) -> float:
    """Return the largest absolute difference of the engine's log-probs from plain forwards on text + thought.

    ``input_ids`` (batch, length) without padding. ``thoughts`` as ``qs_lib.generate_thoughts`` gave them.
    """
    worst = 0.0
    for at, text, thought in _each(input_ids.to(model.device), thoughts):
        plain = _plain(model, text, thought, thoughts)
        ours, counts = (tensor[at][1 : len(thought)] for tensor in (thoughts.logprobs, thoughts.sampled))
        worst = max(worst, ((plain - ours).abs() * counts).max().item())
    return worst


@torch.no_grad()
def own_rounding(model, input_ids: torch.Tensor, thoughts) -> float:
    """Return the same difference between two plain ways: text + thought read whole, and a token at a time with a cache.

    So much the model's own arithmetic leaves open: the deeper the model and the larger its states, the more. 0 for a
    family that cannot go on from a cache exactly.
    """
    worst = 0.0
    if new_cache(model) is None:
        return worst
    for _, text, thought in _each(input_ids.to(model.device), thoughts):
        whole, stepwise = (_plain(model, text, thought, thoughts, steps) for steps in (False, True))
        worst = max(worst, (whole - stepwise)[whole.isfinite()].abs().max().item())
    return worst


def _each(input_ids, thoughts):
    """Yield each thought's index, the text before it and its tokens."""
    for at in torch.cartesian_prod(*map(torch.arange, thoughts.lengths.shape)).tolist():
        text = input_ids[at[0], : thoughts.positions[at[0], at[1]] + 1]
        yield tuple(at), text, thoughts.tokens[tuple(at)][: thoughts.lengths[tuple(at)]]


def _plain(model, text, thought, thoughts, stepwise: bool = False) -> torch.Tensor:
    """Return log-probs of a thought's tokens behind its first, as the sampler has them."""
    ids, cache = torch.cat([text, thought])[None], {"past_key_values": new_cache(model)} if stepwise else {}
    parts = [model(input_ids=part, **cache).logits[0] for part in (ids.split(1, 1) if stepwise else [ids])]
    logits = torch.cat(parts)[len(text) : -1].to(thoughts.logprobs.dtype)
    logits[:, list(thoughts.forbid)] = -torch.inf
    return (logits / (thoughts.temperature or 1.0)).log_softmax(-1).gather(1, thought[1:, None]).squeeze(1)


@torch.no_grad()
def visible_keys(model, input_ids: torch.Tensor, thoughts):
    """Find which tokens the prediction after each thought token depends on, by changing one token at a time.

    ``input_ids`` (1, length). Returns (seen, rule, queries, keys). ``seen`` bool (queries, keys) is measured. ``rule``
    says the same by definition: the text up to the position, and the thought's own tokens so far. ``queries``, ``keys``
    name both axes. What is seen changes a prediction's entropy, or the last state. Measured on the CPU with random
    words, in double precision, on the same architecture with fresh weights: trained attention is so sharp that much of
    what may be read leaves no trace.
    """
    input_ids, thoughts = input_ids.cpu(), thoughts.map(torch.Tensor.cpu)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config).double().eval()
    count, number, length = thoughts.tokens.shape[1:]
    sampled = torch.ones_like(thoughts.sampled)
    sampled[..., 0] = False
    words, most, generator = thoughts.tokens.clone(), min(thoughts.think_id, thoughts.end_id), torch.Generator()
    words[..., 1:] = torch.randint(2, most, words[..., 1:].shape, generator=generator.manual_seed(0))
    thoughts = replace(thoughts, sampled=sampled, lengths=torch.full_like(thoughts.lengths, length))

    def predictions(ids, tokens):
        scored = rescore_thoughts(model, ids, replace(thoughts, tokens=tokens), n_true=1)
        last = scored.thought_hidden[0, ..., 0, :].sum(-1, keepdim=True)
        return torch.cat([scored.thought_entropy[0, ..., 1:], last], -1).flatten()

    base, columns = predictions(input_ids, words), []
    for tensor in (input_ids, words):
        for at in range(tensor.numel()):
            changed = tensor.clone().view(-1)
            changed[at] = changed[at] - 1 if changed[at] > 0 else 1
            changed = changed.view_as(tensor)
            ids, tokens = (changed, words) if tensor is input_ids else (input_ids, changed)
            columns.append(predictions(ids, tokens) != base)
    place = [(p, k, t) for p in range(count) for k in range(number) for t in range(length)]
    positions, text = thoughts.positions[0].tolist(), range(input_ids.shape[1])
    rule = [[j <= positions[p] for j in text] + [u[:2] == (p, k) and u[2] <= t for u in place] for p, k, t in place]
    queries = [f"after {positions[p]}, thought {k + 1}, token {t + 1}" for p, k, t in place]
    keys = [f"text {j}" for j in text] + [f"{positions[p]}.{k + 1}.{t + 1}" for p, k, t in place]
    return torch.stack(columns, 1), torch.tensor(rule), queries, keys
