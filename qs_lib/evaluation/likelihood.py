"""The paper's own signal (arXiv 2403.09629 §5): likelihood of the truth with thoughts, of a text or an answer."""

from dataclasses import replace

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.batches import answer_batch
from ..data.strategies import reply
from ..data.tokens import encode, padded, thinking_ids
from ..errors import at_least
from ..stats import interval
from ..thoughts.generate import Thoughts
from ..thoughts.rescore import rescore_thoughts
from .accuracy import Budget, sorted_batches
from .episodes import draw_thoughts

# Temperatures of the predictions (not of the thoughts) to choose from; below 1 they sharpen.
SHARPENINGS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
CONTROLS = ("without", "temperature", "foreign", "filler")


@torch.no_grad()
def answer_probability(
    model, tokenizer, problems, sharpenings=SHARPENINGS, weights: str = "head", batch_size: int = 120, **budget
) -> dict[str, np.ndarray]:
    """Return the probability of true answers ``with`` thoughts and ``without``, arrays (sharpenings, problems).

    Teacher-forced: the product over the answer's tokens and its closing stop. Each prediction is renormalised over the
    tokens that occur in true answers, as the paper's code does over digits and the line break (eval_helpers.py; arXiv
    2403.09629 appendix A calls it accuracy). Every branch's logits are divided by a sharpening before they are mixed.
    ``weights``: see ``QuietStarForCausalLM.branch_weights``. ``budget`` goes to :func:`draw_thoughts`.
    """
    questions = [p["question"] for p in problems]
    answers = [s.ids[s.start : -1] for s in (encode(tokenizer, p["question"], reply(None, p)) for p in problems)]
    alphabet = torch.tensor(sorted({token for ids in answers for token in ids}), device=model.device)
    lengths = torch.tensor([len(ids) for ids in answers], device=model.device)
    step = torch.arange(max(map(len, answers)), device=model.device)
    sharpening = torch.tensor(sharpenings, device=model.device)
    drawn = draw_thoughts(model.think, tokenizer, questions, batch_size=batch_size, **budget)
    out = {name: np.zeros((len(sharpenings), len(problems))) for name in ("with", "without")}
    for rows in sorted_batches([len(q) for q in questions], batch_size):
        ids, mask, _ = answer_batch(tokenizer, [problems[i] for i in rows], model.device)
        scored = rescore_thoughts(model.lm, ids, Thoughts.cat([drawn[i] for i in rows]), mask, n_true=len(step))
        base, after = scored.base_hidden[:, 0], scored.thought_hidden[:, 0].transpose(1, 2)
        true = torch.searchsorted(alphabet, scored.true[:, 0]).clamp_max(len(alphabet) - 1)  # (B, n_true)
        past = (step >= lengths[rows, None]).unsqueeze(-1)
        mixed = model.mix(base, after, model.branch_weights(base, after, weights), alphabet, sharpening)
        plain = model.visible_log_probs(base, alphabet, sharpening)
        for name, log_probs in (("with", mixed), ("without", plain)):  # (B, n_true, sharpenings, alphabet)
            each = log_probs.gather(-1, true[..., None, None].expand(*log_probs.shape[:-1], 1)).squeeze(-1)
            out[name][:, rows] = each.masked_fill(past, 0).sum(1).exp().T.cpu().numpy()
    return out


def fitted(validation: np.ndarray) -> int:
    """Return the index of the sharpening with the highest mean probability (sharpenings, problems)."""
    return int(validation.mean(1).argmax())


@torch.no_grad()
def text_log_likelihood(
    model, tokenizer, texts, positions: int = 8, batch_size: int = 32, controls: bool = False, **budget
) -> dict[str, np.ndarray]:
    """Return next-token log-probs of held-out texts at evenly spaced ``positions`` (0: all), without and with thoughts.

    ``texts``: (context, continuation) pairs, read as plain documents. The arrays (texts, positions) are in nats, nan
    past the end of a short text: ``without`` (no thoughts), ``with`` (mixed by the head) and ``alone`` (all thoughts
    alike, no vote for the plain prediction). With ``controls`` also what is mixed after ``foreign`` thoughts (of the
    batch's next text) and after ``filler`` (each thought as many ``<step>``). ``budget``: see :class:`Budget`.
    """
    budget, out = Budget(**budget), {}
    generator = budget.generator()
    at_least(1 + controls, texts=len(texts))
    while controls and (batch_size == 1 or len(texts) % batch_size == 1):
        batch_size += 1  # alone in a batch a text would read its own thoughts as foreign ones
    for ids, mask, at in placed(tokenizer, texts, positions, batch_size, model.device):
        thoughts = model.think(ids, mask, at, generator, **budget.drawing, with_hidden=False)
        found = predicted(model, ids, mask, thoughts)
        if controls:
            place = torch.arange(thoughts.tokens.shape[-1], device=ids.device)
            inside = (place > 0) & (place < thoughts.lengths.unsqueeze(-1) - 1)  # between the tags
            filler = thoughts.tokens.masked_fill(inside, thinking_ids(tokenizer)[2])
            foreign = replace(thoughts.map(lambda tensor: tensor.roll(1, 0)), positions=thoughts.positions)
            for name, changed in (("foreign", foreign), ("filler", replace(thoughts, tokens=filler))):
                found[name] = predicted(model, ids, mask, changed)["with"]
            found["foreign"].masked_fill_(at.roll(1, 0) < 0, torch.nan)  # the other text ends before
        for name, value in found.items():
            out.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values).numpy() for name, values in out.items()}


@torch.no_grad()
def plain_log_likelihood(model, tokenizer, texts, positions: int = 8, batch_size: int = 32) -> np.ndarray:
    """Return the same places' log-probs without thoughts at each sharpening, (sharpenings, texts, positions)."""
    out = []
    for ids, mask, at in placed(tokenizer, texts, positions, batch_size, model.device):
        plain = model.visible_log_probs(states_at(model, ids, mask, at))
        true = ids.gather(1, at + 1).unsqueeze(-1)
        found = torch.stack([(plain / s).log_softmax(-1).gather(-1, true).squeeze(-1) for s in SHARPENINGS])
        out.append(found.masked_fill((mask.gather(1, at + 1) == 0) | (at < 0), torch.nan).cpu())
    return torch.cat(out, 1).numpy()


def placed(tokenizer, texts, positions: int, batch_size: int, device):
    """Yield batches of texts, ids and mask (B, L), and evenly spaced places in each (B, positions).

    With ``positions`` 0 these are all but the first and the last token. Shorter texts are filled with -1.
    """
    longest = 0 if positions else max(len(encode(tokenizer, *t).ids) for t in texts)
    for i in tqdm(range(0, len(texts), batch_size), desc="log-likelihood", leave=False):
        rows = [encode(tokenizer, *t).ids[: tokenizer.model_max_length] for t in texts[i : i + batch_size]]
        if positions:
            at = [np.linspace(1, len(r) - 2, positions).round().astype(int).tolist() for r in rows]
        else:
            at = [[*range(1, len(r) - 1), *[-1] * (longest - len(r))] for r in rows]
        yield *padded(tokenizer, rows, device), torch.tensor(at, device=device)


def states_at(model, ids, mask, at) -> torch.Tensor:
    """Return last hidden states without thoughts (B, positions, hidden) at places ``at``, those of the first for -1."""
    hidden = model.read(ids, mask)
    return hidden.gather(1, at.clamp_min(0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def predicted(model, ids, mask, thoughts) -> dict[str, torch.Tensor]:
    """Return ``without``, ``with`` and ``alone`` of the next token at each position, (B, P)."""
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=1, forbid_true=model.config.hidden_ids)
    alone = model.mix_truth(scored, model.mixing_weights(scored, "thoughts"))
    found = {"without": scored.base_logprobs, "with": model.mix_truth(scored), "alone": alone}
    return {name: value.masked_fill(~scored.valid, torch.nan)[..., 0] for name, value in found.items()}


def controlled_log_likelihood(model, tokenizer, texts, held, positions: int = 8, **budget) -> tuple[dict, float]:
    """Return :func:`text_log_likelihood` with all ``CONTROLS``, and the temperature of the control of that name.

    ``temperature``: the plain predictions at the one temperature that makes the ``held`` texts likeliest.
    """
    scores = text_log_likelihood(model, tokenizer, texts, positions, controls=True, **budget)
    test, validation = (plain_log_likelihood(model, tokenizer, part, positions) for part in (texts, held))
    best = int(np.nanmean(validation, (1, 2)).argmax())
    return scores | {"temperature": test[best]}, SHARPENINGS[best]


def log_likelihood_gain(scores: dict, hardest: float = 0.1, control: str = "without") -> dict[str, tuple]:
    """Return the gain of ``with`` over a ``control`` as (value, low, high), nats per token: a mean over texts of theirs.

    Over all tokens (``all``) and over the share that the plain model finds hardest (``hardest``), resampled by text.
    """
    gain = scores["with"] - scores[control]
    hard = np.where(scores["without"] <= np.nanquantile(scores["without"], hardest), gain, np.nan)
    return {"all": interval(np.nanmean(gain, 1)), "hardest": interval(np.nanmean(hard[~np.isnan(hard).all(1)], 1))}
