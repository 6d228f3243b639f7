from contextlib import contextmanager

import torch

from ..data.tokens import thinking_ids


def schedule(step: int, steps: int, warm_up: int = 50, floor: float = 0.02, constant: float = 0.5) -> float:
    """Factor on the learning rate: linear warm-up, constant up to ``constant`` of the steps, linear to ``floor``."""
    if step < min(warm_up, steps // 10):
        return (step + 1) / min(warm_up, steps // 10)
    done = (step / max(1, steps) - constant) / (1 - constant)
    return 1.0 if done <= 0 else 1 - (1 - floor) * min(1.0, done)


@contextmanager
def frozen(reference):
    """The model to compare with: ``reference`` itself, or of a peft model what it was before its adapter, without dropout."""
    if not hasattr(reference, "disable_adapter"):
        yield reference
        return
    training = reference.training
    reference.eval()
    try:
        with reference.disable_adapter():
            yield reference.get_base_model()
    finally:
        reference.train(training)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) per position from (..., vocab) log-probs; 0 where the teacher's probability is 0."""
    impossible = teacher == -torch.inf
    difference = teacher.masked_fill(impossible, 0) - student.masked_fill(impossible, 0)
    return (teacher.exp() * difference).sum(-1)


def add_adapter(model, tokenizer, rank: int):
    """A peft LoRA adapter on all hidden linear layers, and the thinking tokens' eight rows beside it, in place.

    alpha = 2 rank: the authors' alpha of 1 at rank 32 makes an adapter barely act. Raises ``ImportError`` without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("lora_rank needs peft: install it with `pip install peft`, or bake all weights") from None
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    if model.config.tie_word_embeddings:
        ends = {id(model.get_input_embeddings())}  # peft gives the tied head the same rows
    rows = {name: thinking_ids(tokenizer) for name, module in model.named_modules() if id(module) in ends}
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", trainable_token_indices=rows)
    )
