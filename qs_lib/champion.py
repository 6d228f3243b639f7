"""The champion: the language model that is to learn to think. Loaded from anywhere, or trained here from a config."""

import math
import os
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from . import ranks
from .checkpoint import Checkpoint
from .data import pocket
from .data.problems import hub_answers
from .data.strategies import LEAD_WORDS, PROMPTS, reply
from .data.tokens import encode, length_batches, pad
from .errors import HubError, SourceError, TrainingError, WorkbookError
from .files import find_run
from .optim import MuonGrokfast
from .sharding import check_fsdp, clip_grad_norm, shard

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def load_champion(source: str = "pocket", dtype=torch.float32, device: str | None = None, chat_template: bool | None = None):
    """(model, tokenizer) from ``"pocket"`` (the committed run's), a Hugging Face name or a folder.

    The model is in evaluation mode, on ``device`` (by default what ``QS_DEVICE`` says, else the CPU: notebooks repeat their
    numbers there); all that works with it follows its device. The tokenizer pads on the left; ``chat_template``: whether questions are put to
    it as a user's turns (True raises where it has no template), by default if it has one. Only safetensors are read and no code of the
    model's own is run. Raises ``SourceError`` or ``HubError`` with a sentence that says what to do.
    """
    path = find_run("") / "01_token_setup" / "champion" if source == "pocket" else Path(source).expanduser()
    if source == "pocket" and not path.is_dir():
        raise SourceError(f"no pocket champion at {path}: train one with `make run`")
    local = path.is_dir()
    given = {"local_files_only": local or not hub_answers(), "trust_remote_code": False}
    try:
        tokenizer = load_tokenizer(path if local else source, **given)
        model, found = AutoModelForCausalLM.from_pretrained(
            path if local else source, dtype=dtype, use_safetensors=True, output_loading_info=True, **given
        )
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise _unloadable(source, local, given["local_files_only"], error) from None
    if found["missing_keys"]:
        raise SourceError(f"{source} lacks weights that its configuration asks for: {', '.join(sorted(found['missing_keys'])[:3])}")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SourceError(f"{source}: the tokenizer knows {len(tokenizer)} tokens and the model {rows}: they do not belong together")
    if chat_template and not tokenizer.chat_template:
        raise SourceError(f"{source} has no chat template: set chat_template to False, or take the instruction-tuned model")
    if chat_template is False:
        tokenizer.chat_template = None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device or os.environ.get("QS_DEVICE", "cpu")).eval(), tokenizer


def load_tokenizer(source: str | Path, **given):
    """The tokenizer as it was saved: ``AutoTokenizer``, except where a plain one was saved beside a family that has its own.

    There ``AutoTokenizer`` silently puts the family's in its place, which cuts text differently and adds a token (seen with
    transformers 5.23 and Qwen2).
    """
    config = get_tokenizer_config(source, local_files_only=given.get("local_files_only", False))
    plain = config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(source, **given)


def _unloadable(source: str, local: bool, offline: bool, error: Exception) -> WorkbookError:
    """The sentence for a model that could not be loaded."""
    if not local and offline:
        return HubError(f"there is no folder {source}, the hub does not answer, and no copy of {source} was downloaded before: "
                        "give a folder that save_pretrained wrote")  # fmt: skip
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return SourceError(f"{source} cannot be loaded as a causal language model with its tokenizer, weights in safetensors: {reason}")


def build_tokenizer(source: str, texts: list[str], vocab_size: int = 2048, byte_level: bool = False) -> PreTrainedTokenizerFast:
    """The pocket task's word-level tokenizer, or a byte-level BPE trained on ``texts`` in which every digit is a token.

    The pocket task's knows the words of the strategy prompts and the marker words; ``byte_level`` replaces it too.
    """
    words = [*LEAD_WORDS, *" ".join(PROMPTS.values()).split()]
    if source == "pocket" and not byte_level:
        return pocket.build_tokenizer(words)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left",
        model_max_length=512,
    )  # fmt: skip


def build_champion(tokenizer, architecture: str = "llama", hidden_size: int = 128, layers: int = 2, heads: int = 4,
                   intermediate_size: int = 384, seed: int = 0):  # fmt: skip
    """A small model of a known family with fresh weights (tied embeddings, RoPE), sized for ``tokenizer``."""
    if architecture not in CONFIGS:
        raise WorkbookError(f"architecture {architecture!r}; known: {', '.join(CONFIGS)}")
    torch.manual_seed(seed)
    config = CONFIGS[architecture](
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=tokenizer.model_max_length, initializer_range=0.05, attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def corpus(problems: list[dict], seed: int = 0, direct: float = 0.25, facts: float = 0.05,
           hard_worked: float = 1.0, hard_from: int = 3) -> list[tuple[str, str]]:
    """Pre-training documents as (context, reply) texts.

    Shares: ``direct`` answers without work, bare ``facts`` (single equations), the rest worked solutions after a
    strategy prompt (one that fits, or, one time in four where a single one does, chain of thought). A problem of ``hard_from`` steps or more keeps its
    worked solution with probability ``hard_worked`` and is answered directly otherwise: worked solutions of hard
    problems are rare in the wild, their answers are not. Practice goes where it is needed: a problem of fewer than
    ``hard_from`` steps makes a document with probability steps / ``hard_from``.
    """
    rng, documents = random.Random(seed), []
    for problem in problems:
        if rng.random() > min(problem["difficulty"], hard_from) / hard_from:
            continue
        kind, hard = rng.random(), problem["difficulty"] >= hard_from
        if not problem["steps"] or kind < direct or (hard and rng.random() > hard_worked and kind >= direct + facts):
            documents.append((problem["question"], reply(None, problem)))
        elif kind < direct + facts:
            equation = rng.choice(problem["steps"])
            documents.append((equation.split(" = ")[0] + " =", equation.split(" = ")[1] + " ."))
        else:
            strategy = rng.choice(["cot", *3 * problem["fits"]])
            documents.append((f"{PROMPTS[strategy]} {problem['question']}", reply(strategy, problem)))
    return documents


def pretrain(model, tokenizer, documents: list[tuple[str, str]], steps: int, batch_size: int = 32,
             muon_lr: float = 0.02, adamw_lr: float = 3e-3, weight_decay: float = 0.1, context_weight: float = 0.1,
             fsdp: bool = False, seed: int = 0, log=lambda **metrics: None, checkpoint: Checkpoint | None = None):  # fmt: skip
    """Train ``model`` in place on the documents for a fixed number of steps; returns the mean loss of the last tenth.
    With a ``checkpoint``, whose log then counts, a stopped training goes on where it was. ``fsdp``: the model is sharded over
    the processes, and stays so (``sharding``).

    Next-token cross-entropy, context tokens weighted by ``context_weight``. Muon + AdamW, 50 steps of warm-up, constant
    to half, then linear to 2 %. Without ``weight_decay`` (decoupled) attention logits grow to a thousand. Raises
    ``WorkbookError`` on an empty corpus, ``TrainingError`` on a non-finite loss.
    """
    if not documents:
        raise WorkbookError("the champion's corpus is empty: give at least one document")
    check_fsdp(fsdp, checkpoint)
    if fsdp:
        shard(model)
    sequences = [encode(tokenizer, *d) for d in tqdm(documents, desc="tokenise", leave=False)]
    lengths = [len(s.ids) for s in sequences]
    optimizer = MuonGrokfast(model, muon_lr=muon_lr, adamw_lr=adamw_lr, weight_decay=weight_decay,
                             grokfast_lambda=0.0)  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(k, steps))
    rng, queue, losses, every = random.Random(seed), [], [], max(1, min(50, steps // 10))
    model.train()
    ranks.check_equal(model, "before training")
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "order": rng, "queue": queue, "losses": losses}
    with checkpoint or Checkpoint(log=log) as saving:
        first = saving.resume(parts)
        for step in (bar := tqdm(range(first, steps), desc="champion", initial=first, total=steps, disable=not ranks.first())):
            queue[:] = queue or length_batches(lengths, batch_size, rng)
            chosen = ranks.share([sequences[i] for i in queue.pop()])
            ids = pad([s.ids for s in chosen], tokenizer.pad_token_id, device=model.device)
            weights = [[context_weight] * s.start + [1.0] * (len(s.ids) - s.start) for s in chosen]
            weights = pad(weights, 0.0, device=model.device)[:, 1:]
            logits = model(input_ids=ids).logits[:, :-1]  # causal, and padded behind the text: no mask is needed
            nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights)
            loss = ranks.weigh((nll * weights).sum() / weights.sum(), weights.sum())
            value = ranks.mean(loss.item())
            if not math.isfinite(value):
                raise TrainingError(f"the champion's loss is {value} at step {step}: lower the learning rates")
            loss.backward()
            ranks.average(model.parameters())
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(value)
            if (step + 1) % every == 0 or step == steps - 1:
                recent = sum(losses[-every:]) / len(losses[-every:])
                bar.set_postfix(loss=f"{recent:.3f}")
                saving.log(step=step + 1, loss=recent, lr=scheduler.get_last_lr()[0])
            saving.after(step + 1, parts, last=step == steps - 1)
    model.eval()
    ranks.check_equal(model, "after training")
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def schedule(step: int, steps: int, warm_up: int = 50, floor: float = 0.02, constant: float = 0.5) -> float:
    """Factor on the learning rate: linear warm-up, constant up to ``constant`` of the steps, linear to ``floor``."""
    if step < min(warm_up, steps // 10):
        return (step + 1) / min(warm_up, steps // 10)
    done = (step / max(1, steps) - constant) / (1 - constant)
    return 1.0 if done <= 0 else 1 - (1 - floor) * min(1.0, done)
