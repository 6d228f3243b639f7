"""The paper's own signal (arXiv 2403.09629 §5): next-token likelihood of held-out text with thoughts, and its controls."""

from dataclasses import replace

import numpy as np
import torch
from tqdm.auto import tqdm

from .evaluate import interval
from .probability import SHARPENINGS
from .rescoring import rescore_thoughts
from .sequences import encode, pad
from .tokens import thinking_ids

CONTROLS = ("without", "temperature", "foreign", "filler")


@torch.no_grad()
def text_log_likelihood(model, tokenizer, texts: list[tuple[str, str]], positions: int = 8, num_thoughts: int = 4,
                        thought_length: int = 16, temperature: float = 1.0, seed: int = 0, batch_size: int = 32,
                        controls: bool = False) -> dict[str, np.ndarray]:  # fmt: skip
    """Next-token log-probs of held-out text without and with thoughts, at ``positions`` evenly spaced places of each text.

    ``texts``: (context, continuation) pairs, read as plain documents. Returns arrays (texts, positions): ``without``
    (no thoughts), ``with`` (mixed by the head) and ``alone`` (mean over thoughts, no vote for the plain prediction),
    in nats; nan past the end of a short text. With ``controls`` also what the mixture predicts after ``foreign`` thoughts (of
    the batch's next text) and after ``filler`` (each thought as many ``<step>``), and ``sharpened`` (sharpenings, texts,
    positions): the plain predictions at other temperatures, for :func:`with_temperature`.
    """
    generator, out = torch.Generator().manual_seed(seed), {}
    for i in tqdm(range(0, len(texts), batch_size), desc="log-likelihood", leave=False):
        rows = [encode(tokenizer, *t).ids[: tokenizer.model_max_length] for t in texts[i : i + batch_size]]
        ids = pad(rows, tokenizer.pad_token_id, device=model.device)
        mask = pad([[1] * len(r) for r in rows], 0, device=model.device)
        at = torch.tensor([np.linspace(1, len(r) - 2, positions).round().astype(int).tolist() for r in rows],
                          device=model.device)  # fmt: skip
        thoughts = model.think(ids, mask, at, generator, num_thoughts=num_thoughts, thought_length=thought_length,
                               temperature=temperature)  # fmt: skip
        found = predicted(model, ids, mask, thoughts, full=controls)
        if controls:
            step = thinking_ids(tokenizer)[2]
            others = {name: getattr(thoughts, name).roll(1, 0) for name in ("tokens", "lengths", "sampled", "logprobs")}
            inner = thoughts.tokens.masked_fill(inside(thoughts), step)
            for name, changed in (("foreign", replace(thoughts, **others)), ("filler", replace(thoughts, tokens=inner))):
                found[name] = predicted(model, ids, mask, changed)["with"]
        for name, value in found.items():
            out.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values, -2).numpy() for name, values in out.items()}


def predicted(model, ids, mask, thoughts, full: bool = False) -> dict[str, torch.Tensor]:
    """``without``, ``with`` and ``alone`` of the next token at each position, (B, P), and with ``full`` ``sharpened``."""
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=1, forbid_true=tuple(model.config.hidden_ids), true_logits=full)
    base, after = scored.base_logprobs[..., 0], scored.true_logprobs[..., 0]
    weights = model.mixing_head(scored.base_hidden[..., 0, :], scored.thought_hidden[..., 0, :])
    mixed = (weights * torch.cat([base.unsqueeze(-1), after], -1).exp()).sum(-1).clamp_min(1e-30).log()
    found = {"without": base, "with": mixed, "alone": after.exp().mean(-1).log()}
    if full:
        normaliser = [(scored.base_full[..., 0, :] / s).logsumexp(-1) for s in SHARPENINGS]
        found["sharpened"] = torch.stack([base / s - n for s, n in zip(SHARPENINGS, normaliser, strict=True)])
    return {name: value.masked_fill(~scored.valid[..., 0], torch.nan) for name, value in found.items()}


def inside(thoughts) -> torch.Tensor:
    """Which tokens of thoughts stand between the two tags, (B, P, K, T)."""
    place = torch.arange(thoughts.tokens.shape[-1], device=thoughts.tokens.device)
    return (place > 0) & (place < thoughts.lengths.unsqueeze(-1) - 1)


def with_temperature(test: dict[str, np.ndarray], validation: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """The scores of test texts and ``temperature``, the plain predictions at the one temperature that makes validation texts
    likeliest; and that temperature."""
    best = int(np.nanmean(validation["sharpened"], (1, 2)).argmax())
    return test | {"temperature": test["sharpened"][best]}, SHARPENINGS[best]


def log_likelihood_gain(scores: dict[str, np.ndarray], hardest: float = 0.1,
                        control: str = "without") -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """Mean gain of ``with`` over a ``control`` in nats per token with its interval, over all tokens (``all``) and over
    the share of tokens the plain model finds hardest (``hardest``). Texts are the unit of resampling."""
    gain = scores["with"] - scores[control]
    threshold = np.nanquantile(scores["without"], hardest)
    hard = np.where(scores["without"] <= threshold, gain, np.nan)
    kept = hard[~np.isnan(hard).all(1)]
    return {"all": interval(np.nanmean(gain, 1)), "hardest": interval(np.nanmean(kept, 1))}
