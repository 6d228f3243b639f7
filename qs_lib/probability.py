"""The paper's metric, the probability of the true answer, and its control: the same model with one fitted temperature."""

import numpy as np
import torch

from .data.batches import answer_batch
from .data.strategies import reply
from .data.tokens import encode, thinking_ids
from .scoring import batches, draw_thoughts, mixing_weights, together
from .thoughts.rescore import rescore_thoughts

# Temperatures of the predictions (not of the thoughts) to choose from; below 1 they sharpen.
SHARPENINGS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)


@torch.no_grad()
def answer_probability(model, tokenizer, problems: list[dict], sharpenings=SHARPENINGS, weights: str = "head", seed: int = 0,
                       batch_size: int = 120, **settings) -> dict[str, np.ndarray]:  # fmt: skip
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
    truth = torch.tensor([[place[t] for t in ids] + [-1] * (longest - len(ids)) for ids in answers], device=model.device)
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
