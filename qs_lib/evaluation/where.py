"""Where a thought pays: guesses made before any is drawn, against the gains that were measured at every token."""

import numpy as np
import torch
from scipy.stats import rankdata

from ..data.batches import highest
from ..stats import Interval, interval, middle, resampled
from .likelihood import placed, states_at

SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)  # of the tokens of a text at which the model thinks
PAYS = 0.1  # nats above which a thought counts as one that gains


@torch.no_grad()
def places_to_think(model, input_ids, attention_mask=None, count: int = 8) -> torch.LongTensor:
    """Return the ``count`` positions (batch, count), in order, at which the gain head expects most of a thought.

    Nothing is drawn for it, and no later token is read. Rows with fewer positions are filled with -1.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return highest(model.gain_head(model.read(input_ids, mask))[:, :-1], mask, count)


@torch.no_grad()
def foreseen(model, tokenizer, texts, positions: int = 0, batch_size: int = 32) -> dict[str, np.ndarray]:
    """Return guesses of where a thought pays, (texts, positions) each, that read the text alone.

    ``expected``: the gain head's, in nats. ``entropy``: of the plain prediction, in nats. Places are those of
    ``text_log_likelihood``, nan where it has none.
    """
    out = {"expected": [], "entropy": []}
    for ids, mask, at in placed(tokenizer, texts, positions, batch_size, model.device):
        hidden = states_at(model, ids, mask, at)
        found = {"expected": model.gain_head(hidden)}
        found["entropy"] = torch.special.entr(model.visible_log_probs(hidden).exp()).sum(-1)
        for name, values in found.items():
            out[name].append(values.masked_fill(at < 0, torch.nan).cpu())
    return {name: torch.cat(values).numpy() for name, values in out.items()}


def chosen(guess: np.ndarray, share: float) -> np.ndarray:
    """Return which places (texts, positions) have the highest guesses: a ``share`` of each text's, at least one."""
    size = np.maximum(1, np.round(share * (~np.isnan(guess)).sum(1)))
    order = np.argsort(np.argsort(-np.nan_to_num(guess, nan=-np.inf), axis=1, kind="stable"), axis=1)
    return (order < size[:, None]) & ~np.isnan(guess)


def gain_by_share(gain: np.ndarray, guess: np.ndarray, shares=SHARES) -> list[dict]:
    """Return for each share of places what thinking at the best guessed ones gains, a mean over texts of nats per token of all.

    ``gain`` (texts, positions) was measured at every place, so that places are chosen afterwards: a thought at one
    does not change what is drawn at another.
    """
    rows = []
    for share in shares:
        kept = np.where(chosen(guess, share) | np.isnan(gain), gain, 0.0)
        value, low, high = interval(np.nanmean(kept, 1))
        rows.append({"share": share, "value": value, "low": low, "high": high})
    return rows


def area_under_curve(guess: np.ndarray, gain: np.ndarray, seed: int = 0, resamples: int = 200) -> Interval:
    """Return the chance that a place where a thought gains has a higher guess than one where it does not.

    It gains if ``gain`` (texts, positions) is above ``PAYS``. Ties count half. The interval is a bootstrap over texts.
    """

    def area(rows):
        there = ~np.isnan(guess[rows])
        return ranked(guess[rows][there], gain[rows][there] > PAYS)

    return area(slice(None)), *middle([area(rows) for rows in resampled(len(guess), seed, resamples)])


def ranked(values: np.ndarray, wanted: np.ndarray) -> float:
    """Return the area under the ROC curve of ``values`` for the places that are ``wanted``, nan if all are or none."""
    if (n := int(wanted.sum())) in (0, len(wanted)):
        return float("nan")
    return float((rankdata(values)[wanted].sum() - n * (n + 1) / 2) / (n * (len(wanted) - n)))
