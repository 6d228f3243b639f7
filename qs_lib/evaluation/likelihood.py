"""The paper's own signal (arXiv 2403.09629 §5): likelihood of the truth with thoughts, of a text or of an answer, and its controls."""

from dataclasses import replace

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.batches import answer_batch
from ..data.strategies import reply
from ..data.tokens import encode, pad, thinking_ids
from ..stats import interval
from ..thoughts.attention import LanguageHead, backbone
from ..thoughts.rescore import rescore_thoughts
from .episodes import batches, draw_thoughts, mixing_weights, together

# Temperatures of the predictions (not of the thoughts) to choose from; below 1 they sharpen.
SHARPENINGS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
CONTROLS = ("without", "temperature", "foreign", "filler")


@torch.no_grad()
def answer_probability(
    model,
    tokenizer,
    problems: list[dict],
    sharpenings=SHARPENINGS,
    weights: str = "head",
    seed: int = 0,
    batch_size: int = 120,
    **settings,
) -> dict[str, np.ndarray]:
    """Probability of each problem's true answer ``with`` thoughts (mixed) and ``without``, arrays (sharpenings, problems).

    Teacher-forced; the product over the answer's tokens and its closing stop, each prediction renormalised over the tokens
    that occur in true answers, as the paper's code does over digits and the line break (eval_helpers.py; arXiv 2403.09629
    appendix A calls it accuracy). Every branch's log-probs are divided by a sharpening before they are mixed. ``weights`` as
    in ``decode_with_thoughts``; ``settings`` (number, length, temperature of thoughts) go to ``draw_thoughts``.
    """
    answers = [encode(tokenizer, p["question"], reply(None, p)) for p in problems]
    answers = [s.ids[s.start : -1] for s in answers]
    alphabet = torch.tensor(sorted({token for ids in answers for token in ids}), device=model.device)
    place = {token: i for i, token in enumerate(alphabet.tolist())}
    longest = max(map(len, answers))
    truth = torch.tensor(
        [[place[t] for t in ids] + [-1] * (longest - len(ids)) for ids in answers], device=model.device
    )
    questions, tags = [p["question"] for p in problems], tuple(thinking_ids(tokenizer))
    drawn = draw_thoughts(model.think, tokenizer, questions, seed, batch_size, **settings)
    out = {name: np.zeros((len(sharpenings), len(problems))) for name in ("with", "without")}
    for rows in batches(questions, batch_size):
        thoughts = together([drawn[i] for i in rows])
        ids, mask, _ = answer_batch(tokenizer, [problems[i] for i in rows], model.device)
        scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=longest, true_logits=True, forbid_true=tags)
        after, base = (full[:, 0].index_select(-1, alphabet) for full in (scored.true_full, scored.base_full))
        mixing = mixing_weights(model, scored, weights)[:, 0]
        true = truth[rows]
        for at, sharpening in enumerate(sharpenings):
            plain, thinking = ((x / sharpening).softmax(-1) for x in (base, after))
            mixed = (mixing.unsqueeze(-1) * torch.cat([plain.unsqueeze(2), thinking.transpose(1, 2)], 2)).sum(2)
            for name, predicted in (("with", mixed), ("without", plain)):
                each = predicted.gather(-1, true.clamp_min(0).unsqueeze(-1)).squeeze(-1)
                out[name][at, rows] = each.masked_fill(true < 0, 1).prod(-1).cpu().numpy()
    return out


def fitted(validation: np.ndarray) -> int:
    """Index of the sharpening with the highest mean probability on validation problems (sharpenings, problems)."""
    return int(validation.mean(1).argmax())


@torch.no_grad()
def text_log_likelihood(
    model,
    tokenizer,
    texts: list[tuple[str, str]],
    positions: int = 8,
    num_thoughts: int = 4,
    thought_length: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    controls: bool = False,
) -> dict[str, np.ndarray]:
    """Next-token log-probs of held-out text without and with thoughts, at ``positions`` evenly spaced places of each text.

    ``texts``: (context, continuation) pairs, read as plain documents. Returns arrays (texts, positions): ``without``
    (no thoughts), ``with`` (mixed by the head) and ``alone`` (mean over thoughts, no vote for the plain prediction),
    in nats; nan past the end of a short text. With ``controls`` also what the mixture predicts after ``foreign`` thoughts (of
    the batch's next text) and after ``filler`` (each thought as many ``<step>``).
    """
    generator, out = torch.Generator().manual_seed(seed), {}
    for ids, mask, at in _placed(tokenizer, texts, positions, batch_size, model.device):
        thoughts = model.think(
            ids,
            mask,
            at,
            generator,
            num_thoughts=num_thoughts,
            thought_length=thought_length,
            temperature=temperature,
            with_hidden=False,
        )
        found = predicted(model, ids, mask, thoughts)
        if controls:
            step = thinking_ids(tokenizer)[2]
            others = {name: getattr(thoughts, name).roll(1, 0) for name in ("tokens", "lengths", "sampled", "logprobs")}
            inner = thoughts.tokens.masked_fill(inside(thoughts), step)
            for name, changed in (
                ("foreign", replace(thoughts, **others)),
                ("filler", replace(thoughts, tokens=inner)),
            ):
                found[name] = predicted(model, ids, mask, changed)["with"]
        for name, value in found.items():
            out.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values).numpy() for name, values in out.items()}


@torch.no_grad()
def plain_log_likelihood(
    model, tokenizer, texts: list[tuple[str, str]], positions: int = 8, batch_size: int = 32
) -> np.ndarray:
    """The same places' next-token log-probs without thoughts at each temperature of ``SHARPENINGS``, (sharpenings, texts, positions)."""
    out = []
    for ids, mask, at in _placed(tokenizer, texts, positions, batch_size, model.device):
        hidden = backbone(model.lm)(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = LanguageHead(model.lm)(hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))).float()
        logits[..., model.config.hidden_ids] = -torch.inf
        true = ids.gather(1, at + 1).unsqueeze(-1)
        found = torch.stack([(logits / s).log_softmax(-1).gather(-1, true).squeeze(-1) for s in SHARPENINGS])
        out.append(found.masked_fill(mask.gather(1, at + 1) == 0, torch.nan).cpu())
    return torch.cat(out, 1).numpy()


def _placed(tokenizer, texts, positions: int, batch_size: int, device):
    """Batches of texts and of evenly spaced places in each: ids and mask (B, L), places (B, positions)."""
    for i in tqdm(range(0, len(texts), batch_size), desc="log-likelihood", leave=False):
        rows = [encode(tokenizer, *t).ids[: tokenizer.model_max_length] for t in texts[i : i + batch_size]]
        at = [np.linspace(1, len(r) - 2, positions).round().astype(int).tolist() for r in rows]
        yield (
            pad(rows, tokenizer.pad_token_id, device=device),
            pad([[1] * len(r) for r in rows], 0, device=device),
            torch.tensor(at, device=device),
        )


def predicted(model, ids, mask, thoughts) -> dict[str, torch.Tensor]:
    """``without``, ``with`` and ``alone`` of the next token at each position, (B, P)."""
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=1, forbid_true=tuple(model.config.hidden_ids))
    base, after = scored.base_logprobs[..., 0], scored.true_logprobs[..., 0]
    weights = model.mixing_head(scored.base_hidden[..., 0, :], scored.thought_hidden[..., 0, :])
    mixed = (weights * torch.cat([base.unsqueeze(-1), after], -1).exp()).sum(-1).clamp_min(1e-30).log()
    found = {"without": base, "with": mixed, "alone": after.exp().mean(-1).log()}
    return {name: value.masked_fill(~scored.valid[..., 0], torch.nan) for name, value in found.items()}


def inside(thoughts) -> torch.Tensor:
    """Which tokens of thoughts stand between the two tags, (B, P, K, T)."""
    place = torch.arange(thoughts.tokens.shape[-1], device=thoughts.tokens.device)
    return (place > 0) & (place < thoughts.lengths.unsqueeze(-1) - 1)


def with_temperature(
    scores: dict[str, np.ndarray], test: np.ndarray, validation: np.ndarray
) -> tuple[dict[str, np.ndarray], float]:
    """``scores`` and ``temperature``, the plain predictions of test texts at the one temperature that makes validation texts
    likeliest; and that temperature. ``test``, ``validation``: from :func:`plain_log_likelihood`."""
    best = int(np.nanmean(validation, (1, 2)).argmax())
    return scores | {"temperature": test[best]}, SHARPENINGS[best]


def log_likelihood_gain(
    scores: dict[str, np.ndarray], hardest: float = 0.1, control: str = "without"
) -> dict[str, tuple[float, float, float]]:
    """Mean gain of ``with`` over a ``control`` in nats per token with its interval, over all tokens (``all``) and over
    the share of tokens the plain model finds hardest (``hardest``). Texts are the unit of resampling."""
    gain = scores["with"] - scores[control]
    threshold = np.nanquantile(scores["without"], hardest)
    hard = np.where(scores["without"] <= threshold, gain, np.nan)
    kept = hard[~np.isnan(hard).all(1)]
    return {"all": interval(np.nanmean(gain, 1)), "hardest": interval(np.nanmean(kept, 1))}
