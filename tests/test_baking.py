import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import problems, tiny_lm

import qs_lib as qs
from qs_lib import baking as b
from qs_lib.sequences import marker_spellings
from qs_lib.tokens import thinking_ids


def setup():
    model, tokenizer = tiny_lm()
    text = " think step 9 + 8 = 17 done 17 ."
    plain = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    item = b.thought_item(tokenizer, "work it out step by step .", "ben has 9 pens . ben finds 8 .", plain, ce=True)
    return model, tokenizer, item


def test_forward_kl_by_hand():
    teacher, student = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert b.forward_kl(student, teacher).item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert b.forward_kl(teacher[:2], teacher[:2]) == 0


def test_aligned_positions_and_renamed_markers():
    model, tokenizer, item = setup()
    _s, t, targets, _ = b.aligned_log_probs(model, model, [item], tokenizer)
    think, end = thinking_ids(tokenizer)[:2]
    assert targets[0] == think and targets[-1] == tokenizer.eos_token_id and end in targets
    # by hand: the teacher's first prediction, from its context alone, with "think" called <think>
    context = torch.tensor([item.teacher_ids[: item.teacher_at[0] + 1]])
    logits = model(context).logits[0, -1]
    logits[thinking_ids(tokenizer)] = -torch.inf
    expected = F.log_softmax(logits, -1)
    word = marker_spellings(tokenizer)[think][0]
    assert t[0, think].item() == pytest.approx(expected[word].item(), abs=1e-5)
    assert t[0, word] == -torch.inf
    assert t.exp().sum(-1).allclose(torch.ones(len(t)), atol=1e-5)


def test_zero_change_has_zero_kl_for_a_direct_answer():
    model, tokenizer, _ = setup()
    item = b.direct_item(tokenizer, "ben has 9 pens .", tokenizer.encode(" 9 .") + [tokenizer.eos_token_id])
    s, t, *_ = b.aligned_log_probs(model, copy.deepcopy(model), [item], tokenizer)
    assert b.forward_kl(s, t).abs().max() < 1e-6


def test_the_first_reply_token_moves_the_loss():
    """The published code indexes logits by reply positions and never trains the first reply token."""
    model, tokenizer, item = setup()
    first = thinking_ids(tokenizer)[0]
    s, *_ = b.aligned_log_probs(model, model, [item], tokenizer)
    s[0, first].backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    loss, _ = b.baking_loss(model, model, [item], tokenizer)
    later = copy.deepcopy(item)
    later.teacher_at, later.student_at, later.targets = later.teacher_at[1:], later.student_at[1:], later.targets[1:]
    assert loss > b.baking_loss(model, model, [later], tokenizer)[0] + 1


def test_teacher_is_bit_equal_after_baking_and_the_student_moves():
    model, tokenizer = tiny_lm()
    data = qs.reasoning_dataset(problems(size=600), problems("validation"), cot=8, per_strategy=2)
    kept = []


    original = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = copy.deepcopy(model)

    def sampled(teacher_, tokenizer_, problems_, **_):
        kept.append(teacher_)
        return [b.thought_item(tokenizer_, "doubt it and check again .", p["question"],
                               tokenizer_.encode(f" think step {p['steps'][0]} done {p['answer']} .") +
                               [tokenizer_.eos_token_id]) for p in problems_]  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(b, "sample_trajectories", sampled)
        seen = []
        result = b.bake(model, tokenizer, list(data["train"]), problems(size=40), problems("validation"), epochs=2,
                        trajectories=8, batch_size=8, on_epoch=lambda e, m: seen.append(e))  # fmt: skip
    for state in (teacher.state_dict(), kept[0].state_dict()):
        assert all(torch.equal(state[k], v) for k, v in original.items())
    assert not all(torch.equal(model.state_dict()[k], v) for k, v in original.items())
    assert seen == [1, 2] and len(result.epochs) == 2 and result.kl_after < result.epochs[0]["kl"] * 1.5
    assert result.gap_closed == pytest.approx(1 - result.kl_after / result.kl_before)


def test_a_teacher_that_never_thinks_is_one_sentence():
    model, tokenizer = tiny_lm()
    with pytest.raises(ValueError, match="writes no thought on held-out questions"):
        b.bake(model, tokenizer, [], problems(), problems("validation"), trajectories=4)
