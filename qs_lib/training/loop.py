"""What the three trainings share: the schedule, one update, a LoRA adapter, and the KL to a frozen reference."""

import math
from contextlib import contextmanager

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..data.tokens import thinking_ids
from ..errors import TrainingError
from ..thoughts.attention import recompute_layers
from . import distributed


def scheduled(optimizer, steps: int, warm_up: int = 50, constant: float = 0.5) -> LambdaLR:
    """Return a scheduler: linear warm-up, the whole rate up to ``constant`` of the steps, then linear to 2 % of it."""
    warm_up = min(warm_up, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step / max(1, steps) - constant) / (1 - constant)
        return 1.0 if done <= 0 else 1 - 0.98 * min(1.0, done)

    return LambdaLR(optimizer, factor)


def update(loss: torch.Tensor, optimizer, scheduler, clipped: dict, name: str) -> dict[str, float]:
    """Take one optimizer step on ``loss``. Return the ``loss``, the mean over the processes, and the gradient norms.

    ``clipped``: part -> its parameters. The gradient norm of each part is clipped to 1, and returned as
    ``gradient_part``, as it was before. Raises ``TrainingError`` with the training's ``name`` if the loss is not
    finite. Nothing is updated then.
    """
    value = distributed.mean(loss.item())
    if not math.isfinite(value):
        raise TrainingError(f"{name} is {value} at step {scheduler.last_epoch}: lower the learning rates")
    loss.backward()
    found = {"loss": value}
    for part, parameters in clipped.items():
        group = list(parameters)
        distributed.average(group)
        found[f"gradient_{part}"] = torch.nn.utils.clip_grad_norm_(group, 1.0).item()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return found


def add_adapter(model, tokenizer, rank: int):
    """Add a LoRA adapter (peft) to all hidden linear layers, in place. The thinking tokens' rows are trained beside it.

    alpha = 2 rank. The authors of prompt baking set alpha to 1 at rank 32, with which an adapter barely acts. Raises
    ``ImportError`` without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model

        from . import adapter
    except ImportError:
        raise ImportError("lora_rank needs peft: install it with `pip install peft`, or train all weights") from None
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    if model.config.tie_word_embeddings:
        ends = {id(model.get_input_embeddings())}  # peft gives the tied head the same rows
    rows = {name: thinking_ids(tokenizer) for name, module in model.named_modules() if id(module) in ends}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", trainable_token_indices=rows)
    return adapter.hasten(get_peft_model(model, config)).train(model.training)


@contextmanager
def training(lm, tokenizer, s):
    """Yield the language model to train, ``lm`` or a peft model around it, as ``lora_rank`` and
    ``gradient_checkpointing`` of the settings ask.

    At the end the adapter is merged into ``lm``. After an error it is taken off. Either way ``lm`` is a plain model
    again, in evaluation mode, with the hooks and ``requires_grad`` of before.
    """
    flags, recomputed = {name: p.requires_grad for name, p in lm.named_parameters()}, _recomputes(lm)
    hooked = getattr(lm, "_require_grads_hook", None)
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)  # else an adapter begins as whatever was drawn before left it
        trained = add_adapter(lm, tokenizer, s.lora_rank) if s.lora_rank else lm
    leave = trained.unload if s.lora_rank else lm.eval
    try:
        if s.gradient_checkpointing and not recomputed:
            recompute_layers(lm)
        yield trained
        leave = trained.merge_and_unload if s.lora_rank else lm.eval
    finally:
        leave()
        lm.eval()
        for name, p in lm.named_parameters():
            p.requires_grad_(flags[name])
        if _recomputes(lm) and not recomputed:
            renamed = getattr(lm, "activation_checkpointing_disable", None)
            (renamed or lm.gradient_checkpointing_disable)()
        if hooked is None and getattr(lm, "_require_grads_hook", None) is not None:
            lm.disable_input_require_grads()


def _recomputes(lm) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())


@contextmanager
def frozen(reference):
    """Yield the model to compare with: ``reference``, or a peft model as it was before its adapter, without dropout."""
    if not hasattr(reference, "disable_adapter"):
        yield reference
        return
    modes = {module: module.training for module in reference.modules()}  # they need not be all alike
    reference.eval()
    try:
        with reference.disable_adapter():
            yield reference.get_base_model()
    finally:
        for module, mode in modes.items():
            module.training = mode


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) per position (...), in nats, from log-probs (..., vocab). 0 x log 0 is 0."""
    impossible = teacher == -torch.inf
    difference = teacher.masked_fill(impossible, 0) - student.masked_fill(impossible, 0)
    return (teacher.exp() * difference).sum(-1)
