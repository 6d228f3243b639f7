"""Belief before the thought: what a linear probe reads of the answer before the first thinking token is written."""

import numpy as np
import torch

from ..data.tokens import encode_context, padded
from .accuracy import sorted_batches

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean of the kernel's diagonal
FOLDS = 5


class Practice(list):
    """Training problems or questions. A probe learns from ``most``, which it reads once for the same weights."""

    def __init__(self, problems, most: int = 2000):
        super().__init__(problems)
        self.problems, self._seen = [p for p in self if not isinstance(p, str)][:most], {}

    def states(self, lm, tokenizer) -> np.ndarray | None:
        """Return :func:`states_before` of the problems, or None where there are questions only."""
        weights = tuple(p.detach().double().norm().item() for p in lm.parameters())
        if self.problems and weights not in self._seen:
            self._seen[weights] = states_before(lm, tokenizer, [p["question"] for p in self.problems])
        return self._seen.get(weights)


@torch.no_grad()
def states_before(lm, tokenizer, questions: list[str], batch_size: int = 120) -> np.ndarray:
    """Return a causal LM's states of all layers at each question's last token, (questions, layers x hidden)."""
    found = {}
    for rows in sorted_batches([len(q) for q in questions], batch_size):
        ids, mask = padded(tokenizer, [encode_context(tokenizer, questions[i]) for i in rows], lm.device)
        layers = lm(input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1).hidden_states
        at = (torch.arange(len(ids), device=ids.device), mask.sum(1) - 1)
        found |= dict(zip(rows, torch.cat([h[at].float() for h in layers], -1).cpu().numpy(), strict=True))
    return np.stack([found[i] for i in range(len(questions))])


def probed(states: np.ndarray, answers, practice: np.ndarray | None = None, practised=()) -> np.ndarray:
    """Return the answers that a linear probe reads from ``states`` (questions, features), as an array of texts.

    The probe is a ridge regression on one indicator for each answer. It learns from ``practice`` states and their
    ``practised`` answers, or else from the other folds of ``states`` and ``answers``. Its ridge is chosen on the last
    fifth of what it learns from.
    """
    if practice is not None:
        return _ridge(practice, np.asarray(practised, object), states)
    found, answers = np.empty(len(states), object), np.asarray(answers, object)
    for fold in range(FOLDS):
        left = np.arange(len(states)) % FOLDS == fold
        found[left] = _ridge(states[~left], answers[~left], states[left])
    return found


def _ridge(known: np.ndarray, answers: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Fit on ``known`` states (n, features) and predict. Of the primal and the dual form the smaller one is solved."""
    mean, scale = known.mean(0), known.std(0) + 1e-6
    known, asked = (known - mean) / scale, (asked - mean) / scale
    texts = np.unique(answers.astype(str))
    targets = (answers.astype(str)[:, None] == texts) - 1 / len(texts)
    kept = max(1, len(known) - len(known) // 5)

    def predict(rows, ridge, at):
        x, y = known[rows], targets[rows]
        dual = len(x) < x.shape[1]
        kernel = x @ x.T if dual else x.T @ x
        kernel[np.diag_indices_from(kernel)] += ridge * np.trace(kernel) / len(x)
        weights = x.T @ np.linalg.solve(kernel, y) if dual else np.linalg.solve(kernel, x.T @ y)
        return texts[(at @ weights).argmax(1)].astype(object)

    trial = slice(kept, None) if kept < len(known) else slice(None)
    right = [(predict(slice(kept), ridge, known[trial]) == answers[trial]).mean() for ridge in RIDGES]
    return predict(slice(None), RIDGES[int(np.argmax(right))], asked)
