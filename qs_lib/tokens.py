"""The eight thinking tokens: adding them to any Hugging Face model without moving what it already says."""

import torch
from tokenizers import AddedToken

from .errors import WorkbookError

THINKING_TOKENS = ("<think>", "</think>", "<step>", "<reason>", "<mece>", "<falsify>", "<expert>", "<doubt>")

# The word a prompted model writes where a baked one writes the token. Replies are made and sampled in words, then
# turned into tokens one for one, so the prompted teacher never has to read rows it was not trained on.
PLAIN_WORDS = {
    "<think>": "think", "</think>": "done", "<step>": "step", "<reason>": "reason", "<mece>": "parts",
    "<falsify>": "refute", "<expert>": "expert", "<doubt>": "doubt",
}  # fmt: skip

# Plain words whose embeddings are averaged into a new token's first row.
DESCRIPTIONS = {
    "<think>": "think work out", "</think>": "done answer so", "<step>": "step next then",
    "<reason>": "reason because side", "<mece>": "parts all groups", "<falsify>": "refute wrong false",
    "<expert>": "expert rule how", "<doubt>": "doubt check again",
}  # fmt: skip


def thinking_ids(tokenizer) -> list[int]:
    """Ids of the eight tokens, in the order of ``THINKING_TOKENS``. Raises ``WorkbookError`` if one is missing."""
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in THINKING_TOKENS if t not in vocabulary]
    if missing:
        raise WorkbookError(f"the tokenizer lacks {', '.join(missing)}: call add_thinking_tokens(model, tokenizer) first")
    return [vocabulary[t] for t in THINKING_TOKENS]


@torch.no_grad()
def add_thinking_tokens(model, tokenizer):
    """Add the missing ones of the eight thinking tokens; a second call changes nothing. Returns (model, tokenizer).

    New input and output rows are the mean of the rows of a few plain words that say what the token means
    (``DESCRIPTIONS``), scaled to the median norm of the existing rows. Rows and logits of all other tokens stay as
    they are, a padded embedding matrix is never shrunk, and a token the tokenizer has already keeps its id, row and
    flags. Sets ``config.think_token_id`` and ``config.end_think_token_id``.
    """
    known = tokenizer.get_vocab()
    new = [t for t in THINKING_TOKENS if t not in known]
    plain_ids = {t: _plain_ids(tokenizer, DESCRIPTIONS[t]) for t in new}
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in new])
    ids = tokenizer.convert_tokens_to_ids(new)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new:
        matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        old_rows = torch.tensor(sorted(set(known.values()) - set(ids)))
        for weight in matrices.values():
            norm = weight[old_rows].norm(dim=1).median()
            for token, row in zip(new, ids, strict=True):
                mean = weight[plain_ids[token]].mean(0)
                weight[row] = mean * (norm / mean.norm().clamp_min(1e-8))
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias[ids] = bias[old_rows].mean()
    every = thinking_ids(tokenizer)
    model.config.think_token_id, model.config.end_think_token_id = every[0], every[1]
    return model, tokenizer


def _plain_ids(tokenizer, words: str) -> list[int]:
    """Ids of the words the tokenizer can spell; all of its ordinary rows' stand-in, the whole text, if none."""
    unknown = tokenizer.unk_token_id
    ids = [i for w in words.split() for i in tokenizer.encode(" " + w, add_special_tokens=False) if i != unknown]
    return ids or tokenizer.encode(tokenizer.eos_token, add_special_tokens=False)
