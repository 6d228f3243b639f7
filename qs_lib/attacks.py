"""Attacks on thoughts: what the model gets to read after the question instead of its own."""

import numpy as np
import torch

from .data.tokens import thinking_ids

ATTACKS = ("own", "none", "foreign", "foreign_family", "shuffled", "filler", "last_step_deleted")


def attacked_thoughts(attack: str, tokens, lengths, problems, tokenizer, rng):
    """Thoughts (problems, K, T) and lengths (problems, K) as an attack leaves them; tags stay in place.

    ``own`` and ``none`` are left as they are (the caller leaves the thoughts out for ``none``). ``rng``: numpy
    generator that picks other problems and orders.
    """
    tokens, lengths = tokens.clone(), lengths.clone()
    if attack in ("foreign", "foreign_family"):
        source = other_problem(problems, rng, same_family=attack == "foreign_family")
        return tokens[source], lengths[source]
    step = thinking_ids(tokenizer)[2]
    for b, k in np.ndindex(*lengths.shape) if attack in ("shuffled", "filler", "last_step_deleted") else ():
        end = lengths[b, k].item() - 1
        inner = tokens[b, k, 1:end]
        if attack == "shuffled":
            tokens[b, k, 1:end] = inner[torch.from_numpy(rng.permutation(len(inner)))]
        elif attack == "filler":
            tokens[b, k, 1:end] = step
        else:
            steps = (inner == step).nonzero()
            cut = 1 + (steps[-1].item() if len(steps) else 2 * len(inner) // 3)
            tokens[b, k, cut:] = tokens[b, k, end].item()
            lengths[b, k] = cut + 1
    return tokens, lengths


def other_problem(problems, rng, same_family: bool) -> torch.Tensor:
    """For each problem the index of another with a different answer (of the same family where there is one)."""
    out = []
    for i, p in enumerate(problems):
        other = [j for j, q in enumerate(problems) if q["answer"] != p["answer"]]
        kin = [j for j in other if problems[j]["family"] == p["family"]] if same_family else other
        pick = kin or other or [j for j in range(len(problems)) if j != i]
        out.append(int(rng.choice(pick)))
    return torch.tensor(out)
