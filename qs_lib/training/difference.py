"""What a run learnt as its difference to the champion: small enough to be committed, and put back on the champion."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..champion import load_champion
from ..data.tokens import add_thinking_tokens, thinking_ids
from ..errors import SourceError, UpstreamError, WorkbookError, at_least
from ..files import REPOSITORY, atomic_write, find_run, to_json
from ..model import THINKING_SETTINGS, QuietStarForCausalLM

_WEIGHTS, _RECORD = "difference.safetensors", "difference.json"
HEADS = ("mixing_head.", "gain_head.")


def load_run(name: str = "", device: str | None = None):
    """Load (``QuietStarForCausalLM``, tokenizer) of a run, by its name or folder. "" is the committed pocket run.

    A run that holds the whole model in ``quietstar/`` gives that. Of another the champion is loaded, wherever it is
    from, and what is stored in ``difference/`` is put on it. Raises ``UpstreamError`` if there is no such run or model,
    and ``SourceError`` if the champion is missing or is not the one that was trained.
    """
    committed = REPOSITORY / "outputs" / name
    try:
        folder = find_run(name)
    except UpstreamError:
        if not committed.is_dir():
            raise
        folder = committed  # runs are kept elsewhere (QS_OUTPUTS)
    if any((folder / "quietstar").glob("model*.safetensors")):
        return load_champion(str(folder / "quietstar"), device=device)
    kept = folder / "difference"
    if not kept.is_dir():
        raise UpstreamError(f"{folder} holds no trained model: make it with `make run RUN={folder.name}`")
    try:
        record, tensors = json.loads((kept / _RECORD).read_text(encoding="utf-8")), load_file(kept / _WEIGHTS)
        champion, template, settings = (record[key] for key in ("champion", "chat_template", "settings"))
        largest = tensors["champion"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UpstreamError(f"{kept} cannot be read ({reason}): write it again with save_difference") from None
    lm, tokenizer = add_thinking_tokens(*load_champion(champion, device=device, chat_template=template))
    if len(norms := _norms(lm)) != len(largest) or not norms.allclose(largest, rtol=1e-6):
        raise SourceError(f"{champion} is not the model that {folder.name} was trained from: its weights differ")
    model = QuietStarForCausalLM.from_base(lm, tokenizer, **settings)
    _put(model, tensors, thinking_ids(tokenizer))
    return model, tokenizer


@torch.no_grad()
def save_difference(folder, model, tokenizer, champion: str, rank: int = 24) -> float:
    """Save into ``folder`` what ``model`` learnt since ``champion`` (a name or folder, as :func:`load_champion` takes
    it), as ``load_run`` reads it from ``difference/`` of a run. Return the largest relative error of a weight's change.

    The change of each matrix becomes two factors of ``rank``, the best there are. Adapters that were merged one after
    another have at most the sum of their ranks, and then only the rounding to bfloat16 is lost. The eight tokens' rows
    and the mixing head are kept beside them. Raises ``WorkbookError`` if other weights changed: the change is
    not an adapter's, and the whole model is to be saved.
    """
    at_least(1, rank=rank)
    lm, words = add_thinking_tokens(*load_champion(champion, chat_template=bool(tokenizer.chat_template)))
    ids, before = thinking_ids(tokenizer), dict(lm.named_parameters())
    shapes = [{n: w.shape for n, w in part.named_parameters()} for part in (lm, model.lm)]
    if shapes[0] != shapes[1] or thinking_ids(words) != ids:
        raise SourceError(f"the model was not trained from {champion}: its weights or tokens are others")
    tensors, worst = {"champion": _norms(lm)}, 0.0
    rows = _embeddings(model.lm)
    for name, weight in model.lm.named_parameters():
        weight, old = weight.detach().cpu(), before[name].cpu()
        if name in rows:
            tensors[name] = weight[ids].bfloat16()
            old[ids] = weight[ids]
        change = weight.double() - old.double()
        if not change.any():
            continue
        if name in rows or change.dim() != 2:
            raise WorkbookError(f"{name} changed, which no adapter does: save the whole model with save_pretrained")
        left, right = _factors(change, rank)
        tensors |= {f"{name}.left": left, f"{name}.right": right}
        worst = max(worst, ((change - left.double() @ right.double()).norm() / change.norm()).item())
    tensors |= {n: w.cpu().bfloat16() for n, w in model.state_dict().items() if n.startswith(HEADS)}
    record = {"champion": champion, "chat_template": bool(tokenizer.chat_template), "rank": rank}
    record |= {"largest_error": worst, "settings": {key: getattr(model.config, key) for key in THINKING_SETTINGS}}
    with atomic_write(Path(folder)) as temporary:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _WEIGHTS)
        (temporary / _RECORD).write_text(to_json(record, 1) + "\n", encoding="utf-8")
    return worst


@torch.no_grad()
def _put(model, tensors: dict, ids: list[int]) -> None:
    """Put the stored changes on the champion inside ``model``, and the stored heads beside it."""
    weights, device = dict(model.lm.named_parameters()), model.device
    for name, weight in weights.items():
        if name in tensors:
            weight[ids] = tensors[name].to(weight)
        if f"{name}.left" in tensors:
            left, right = (tensors[f"{name}.{side}"].to(device, torch.float32) for side in ("left", "right"))
            weight += left @ right
    for name, weight in model.state_dict().items():
        if name.startswith(HEADS[0]) or name in tensors and name.startswith(HEADS):  # older files have no gain head
            weight.copy_(tensors[name])


def _factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows, rank) and (rank, columns) in bfloat16 whose product is nearest to ``change`` (rows, columns)."""
    with torch.random.fork_rng(devices=[]):  # its sketch is random, and no caller's draws are to move
        torch.manual_seed(0)
        most = min(rank + 16, *change.shape)  # beyond the rank, to be exact in it
        u, s, v = torch.svd_lowrank(change, most, niter=4)
    left, right = ((side * s.sqrt())[:, :rank] for side in (u, v))
    return left.contiguous().bfloat16(), right.T.contiguous().bfloat16()


def _embeddings(lm) -> set[str]:
    """Return the names of the matrices with a row for each token."""
    ends = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    return {name for name, weight in lm.named_parameters() if id(weight) in ends}


@torch.no_grad()
def _norms(lm) -> torch.Tensor:
    """Return the length of each weight but the embeddings: what tells one champion from another of its shape."""
    rows = _embeddings(lm)
    return torch.stack([w.double().norm().cpu() for name, w in lm.named_parameters() if name not in rows])
