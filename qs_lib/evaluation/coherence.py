"""Coherence of a thought, computed without the label, and utility, which needs it and is a separate number."""

import re
from dataclasses import dataclass

import torch

from ..errors import WorkbookError

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
WORD = re.compile(r"\w+")
CLIP = 6.0  # nats that the gain on a token counts at most, up or down
WEIGHTS = {"semantic": 0.4, "syntactic": 0.3, "predictive": 0.3}


@dataclass
class Scale:
    """Mean and standard deviation of each raw component on validation thoughts, stored with the model as JSON."""

    mean: dict[str, float]
    std: dict[str, float]

    @classmethod
    def fit(cls, raw: dict[str, torch.Tensor]) -> "Scale":
        """Fit the scale to raw components of any shape. Raises ``WorkbookError`` on fewer than two thoughts."""
        if not raw or min(v.numel() for v in raw.values()) < 2:
            raise WorkbookError("the coherence scale needs at least two validation thoughts")
        return cls({k: v.mean().item() for k, v in raw.items()}, {k: max(v.std().item(), 1e-6) for k, v in raw.items()})


@dataclass
class Coherence:
    """Scores in [0, 1], each ``(batch, P, K)``, and ``raw``, the components before scaling."""

    semantic: torch.Tensor
    syntactic: torch.Tensor
    predictive: torch.Tensor
    composite: torch.Tensor
    raw: dict[str, torch.Tensor]


def coherence(tokenizer, input_ids, thoughts, gains, scale: Scale | None = None, attention_mask=None) -> Coherence:
    """Score the coherence of thoughts (``Thoughts``) at their positions, without the label.

    ``gains (batch, P, K, K)``: in [..., k, j] how much likelier thought k makes what the model writes after thought j
    alone, in nats over no thought (``CLIP`` a token at most). Raw components:

    - semantic: share of the numbers read so far (of the words, where there are none) that the thought takes up.
      Cosines of embeddings carry no information on correctness here (measured).
    - syntactic: probability of the thought's least likely sampled token. One slip makes a thought ill-formed.
    - predictive: consensus gain. Does it lead where the others lead? Whole answers are compared: the first token of one
      may be a blank. Lower entropy after a thought does not tell right from wrong: wrong thoughts are confident.

    With ``scale`` each goes through the normal CDF of its z-score, so that none outweighs the others by its spread.
    Without, they are clipped to [0, 1]. The composite is their sum weighted by ``WEIGHTS``.
    """
    raw = {
        "semantic": number_coverage(tokenizer, input_ids, thoughts, attention_mask),
        "syntactic": thoughts.logprobs.masked_fill(~thoughts.sampled, 0).amin(-1).exp(),
        "predictive": consensus_gain(gains),
    }
    if scale is None:
        scaled = raw | {"predictive": (raw["predictive"] + CLIP) / (2 * CLIP)}
        scaled = {k: v.clamp(0, 1) for k, v in scaled.items()}
    else:
        scaled = {k: torch.special.ndtr((v - scale.mean[k]) / scale.std[k]) for k, v in raw.items()}
    return Coherence(**scaled, composite=sum(WEIGHTS[k] * scaled[k] for k in WEIGHTS), raw=raw)


def number_coverage(tokenizer, input_ids, thoughts, attention_mask=None) -> torch.Tensor:
    """Return the share of the different numbers read up to each position that occur in the thought, ``(batch, P, K)``.

    Numbers are read from the decoded text, not from tokens: byte-level tokenizers spell "16" in one token or two, with
    or without a space in it. A text without numbers is compared by its words. The share is 0 where there is nothing.
    """
    special = set(tokenizer.all_special_ids)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    out = torch.zeros(thoughts.lengths.shape, device=thoughts.lengths.device)
    for b, p in torch.cartesian_prod(*map(torch.arange, thoughts.positions.shape)).tolist():
        read = slice(thoughts.positions[b, p].item() + 1)
        ids = input_ids[b, read][real[b, read].bool()].tolist()
        text = tokenizer.decode([i for i in ids if i not in special])
        pattern = NUMBER if NUMBER.search(text) else WORD
        wanted = _found(pattern, text)
        drawn = zip(thoughts.tokens[b, p].tolist(), thoughts.lengths[b, p].tolist(), strict=True)
        for k, (thought, length) in enumerate(drawn):
            out[b, p, k] = len(wanted & _found(pattern, tokenizer.decode(thought[:length]))) / max(1, len(wanted))
    return out


def _found(pattern: re.Pattern, text: str) -> set[str]:
    return {match.replace(",", "").lower() for match in pattern.findall(text)}


def consensus_gain(gains: torch.Tensor) -> torch.Tensor:
    """Return the mean gain of each thought on what the *other* thoughts lead to, nats: (..., K, K) gives (..., K).

    It stands for E_{y ~ other thoughts}[log p_k(y) - log p_0(y)], with y the likeliest answer after each of them. A
    single thought has no others and a gain of 0.
    """
    return (gains.sum(-1) - gains.diagonal(dim1=-2, dim2=-1)) / max(1, gains.shape[-1] - 1)


def utility(scored, clip: float = torch.inf) -> torch.Tensor:
    """Return the gain in log-likelihood of the true tokens after each thought over no thought, nats, ``(batch, P, K)``.

    ``scored``: ``Rescored``. ``clip``: most nats of a token's gain, up or down. This is what training rewards. Where
    the tokens are the label, coherence may not read it.
    """
    gain = (scored.true_logprobs - scored.base_logprobs.unsqueeze(2)).clamp(-clip, clip)
    return (gain * scored.valid.unsqueeze(2)).sum(-1)
