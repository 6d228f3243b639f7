import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import problems, tiny_lm

import qs_lib as qs
from qs_lib import errors
from qs_lib.data.tokens import marker_spellings, thinking_ids
from qs_lib.training import baking as b
from qs_lib.training import loop
from qs_lib.training.settings import QuietStarSettings


def setup():
    model, tokenizer = tiny_lm()
    text = " think step 9 + 8 = 17 done 17 ."
    plain = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    item = b.thought_item(
        tokenizer,
        "work it out step by step . ben has 9 pens . ben finds 8 .",
        "ben has 9 pens . ben finds 8 .",
        plain,
        ce=True,
    )
    return model, tokenizer, item


def test_forward_kl_by_hand():
    teacher, student = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert loop.forward_kl(student, teacher).item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert loop.forward_kl(teacher[:2], teacher[:2]) == 0


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
    assert torch.equal(loop.forward_kl(s, t), torch.zeros(len(t)))


def test_an_adapter_that_does_nothing_has_zero_kl():
    pytest.importorskip("peft")
    model, tokenizer, _ = setup()
    item = b.direct_item(tokenizer, "ben has 9 pens .", tokenizer.encode(" 9 .") + [tokenizer.eos_token_id])
    teacher, student = copy.deepcopy(model), loop.add_adapter(model, tokenizer, rank=2).eval()
    s, t, *_ = b.aligned_log_probs(student, teacher, [item], tokenizer)
    assert torch.equal(loop.forward_kl(s, t), torch.zeros(len(t)))


def test_adapter_trains_lora_and_eight_rows_and_merges_to_the_same_logits(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = tiny_lm()
    ids, before = torch.arange(4, 16)[None], {k: v.clone() for k, v in model.state_dict().items()}
    adapted = loop.add_adapter(model, tokenizer, rank=2)
    optimizer = b.MuonGrokfast(adapted, muon_lr=0.05, adamw_lr=0.05)
    groups = {g["name"]: g["param_names"] for g in optimizer.param_groups}
    assert all("lora_B" in name for name in groups["muon"])
    assert {"lora_A" in n or "trainable_tokens_delta" in n for n in groups["adamw"]} == {True}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad and p.shape == (8, 32)) == 8 * 32
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    assert merged is model and merged(ids).logits.allclose(expected, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    rows = (after["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any(1)
    assert set(rows.nonzero().flatten().tolist()) <= set(thinking_ids(tokenizer))
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path)(ids).logits.allclose(expected, atol=1e-5)


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
        return [
            b.thought_item(
                tokenizer_,
                f"doubt it and check again . {p['question']}",
                p["question"],
                tokenizer_.encode(f" think step {p['steps'][0]} done {p['answer']} .") + [tokenizer_.eos_token_id],
            )
            for p in problems_
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(b, "sample_trajectories", sampled)
        seen = []
        result = b.bake(
            model,
            tokenizer,
            list(data["train"]),
            problems(size=40),
            problems("validation"),
            epochs=2,
            trajectories=8,
            batch_size=8,
            on_epoch=lambda e, m: seen.append(e),
        )
    for state in (teacher.state_dict(), kept[0].state_dict()):
        assert all(torch.equal(state[k], v) for k, v in original.items())
    assert not all(torch.equal(model.state_dict()[k], v) for k, v in original.items())
    assert seen == [1, 2] and len(result.epochs) == 2 and result.kl_after < result.epochs[0]["kl"] * 1.5
    assert result.gap_closed == pytest.approx(1 - result.kl_after / result.kl_before)
    assert all(dose["max_logit"] > 0 for dose in result.epochs)


def plain_trajectories(teacher, tokenizer, records, **_):
    """What a champion that knows the task would write; a random one writes no thought."""
    text = " think step {} done {} ."
    return [
        b.thought_item(
            tokenizer,
            f"doubt it and check again . {p['question']}",
            p["question"],
            tokenizer.encode(text.format(p["steps"][0], p["answer"])) + [tokenizer.eos_token_id],
        )
        for p in records
    ]


def small_bake(monkeypatch, model, tokenizer, **settings):
    monkeypatch.setattr(b, "sample_trajectories", plain_trajectories)
    settings = {"epochs": 2, "trajectories": 8, "batch_size": 8, "max_new_tokens": 4} | settings
    return b.bake(model, tokenizer, [], problems(size=40), problems("validation")[:6], **settings)


def test_lora_baking_leaves_a_plain_model_that_has_moved(monkeypatch):
    pytest.importorskip("peft")
    model, tokenizer = tiny_lm()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    result = small_bake(monkeypatch, model, tokenizer, lora_rank=2, on_epoch=lambda e, m: seen.append(type(m).__name__))
    after = model.state_dict()
    assert after.keys() == before.keys() and len(result.epochs) == 2 and set(seen) == {"PeftModel"}
    moved = [k for k, v in after.items() if not torch.equal(v, before[k])]
    assert any("q_proj" in k for k in moved) and not any("norm" in k for k in moved)
    assert all(p.requires_grad for p in model.parameters())


def test_running_layers_again_bakes_the_same_weights_to_the_bit(monkeypatch):
    (plain, tokenizer), (again, _) = tiny_lm(), tiny_lm()
    small_bake(monkeypatch, plain, tokenizer)
    small_bake(monkeypatch, again, tokenizer, gradient_checkpointing=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in plain.state_dict().items())


def test_autocast_bakes_float32_weights(monkeypatch):
    (plain, tokenizer), (cast, _) = tiny_lm(), tiny_lm()
    losses = []
    real = b.baking_loss
    monkeypatch.setattr(
        b, "baking_loss", lambda *given: losses.append(torch.is_autocast_enabled("cpu")) or real(*given)
    )
    small_bake(monkeypatch, cast, tokenizer, bf16=True)
    assert all(losses) and all(p.dtype == torch.float32 and p.isfinite().all() for p in cast.parameters())
    small_bake(monkeypatch, plain, tokenizer)
    moved = max((v - cast.state_dict()[k]).abs().max().item() for k, v in plain.state_dict().items())
    assert 0 < moved < 0.05


def test_an_adapter_is_its_own_teacher_and_learns_as_beside_a_copy(monkeypatch):
    """No second copy of the weights: the same adapter, and the same teacher, as with a frozen copy of the model."""
    pytest.importorskip("peft")
    (model, tokenizer), (other, _) = tiny_lm(), tiny_lm()
    copied, real = copy.deepcopy(other).eval(), b.aligned_log_probs
    copies = []
    monkeypatch.setattr(
        b.copy,
        "deepcopy",
        lambda thing, *rest, real=copy.deepcopy: copies.append(type(thing).__name__) or real(thing, *rest),
    )
    torch.manual_seed(0)
    small_bake(monkeypatch, model, tokenizer, lora_rank=2)
    assert "LlamaForCausalLM" not in copies
    monkeypatch.setattr(b, "aligned_log_probs", lambda student, _, *rest: real(student, copied, *rest))
    torch.manual_seed(0)
    small_bake(monkeypatch, other, tokenizer, lora_rank=2)
    assert all(torch.allclose(v, other.state_dict()[k], atol=1e-6) for k, v in model.state_dict().items())


def test_a_frozen_adapter_reads_without_dropout_and_is_put_back():
    pytest.importorskip("peft")
    model, tokenizer = tiny_lm()
    ids = torch.tensor([[4, 5, 6]])
    before = model(ids).logits
    adapted = loop.add_adapter(model, tokenizer, rank=2).train()
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    with loop.frozen(adapted) as base:
        assert torch.equal(base(ids).logits, before) and not base.training
    assert adapted.training and not torch.allclose(adapted(ids).logits, before)


def test_baking_clips_the_student_and_never_the_teacher(monkeypatch):
    model, tokenizer = tiny_lm()
    original, threshold, teachers = copy.deepcopy(model.state_dict()), 0.05, []
    real = b.baking_loss
    monkeypatch.setattr(b, "baking_loss", lambda m, teacher, *rest: teachers.append(teacher) or real(m, teacher, *rest))
    free, clipped = (
        small_bake(monkeypatch, tiny_lm()[0], tokenizer, qk_clip_threshold=t).epochs[-1]["max_logit"]
        for t in (0.0, threshold)
    )
    assert clipped < 2 * threshold < free
    assert all(torch.equal(v, original[k]) for k, v in teachers[-1].state_dict().items())


def test_another_optimizer_can_be_handed_over(monkeypatch):
    model, tokenizer = tiny_lm()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small_bake(monkeypatch, model, tokenizer, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_teacher_that_never_thinks_is_one_sentence():
    model, tokenizer = tiny_lm()
    with pytest.raises(ValueError, match="writes no thought on held-out questions"):
        b.bake(model, tokenizer, [], problems(), problems("validation"), trajectories=4)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"gradient_checkpointing": True, "lora_rank": 2}])
@pytest.mark.parametrize("fails", [None, KeyboardInterrupt, "loss"])
def test_baking_leaves_a_plain_model_in_evaluation_mode(monkeypatch, settings, fails):
    pytest.importorskip("peft")
    model, tokenizer = tiny_lm()
    model.model.norm.requires_grad_(False)
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    kinds = {n: type(m) for n, m in model.named_modules()}

    def stop(*given):
        if fails == "loss":
            return torch.tensor(torch.nan, requires_grad=True), torch.tensor(0.0)
        raise fails

    if fails:
        monkeypatch.setattr(b, "baking_loss", stop)
        with pytest.raises((KeyboardInterrupt, errors.TrainingError)):
            small_bake(monkeypatch, model, tokenizer, **settings)
    else:
        small_bake(monkeypatch, model, tokenizer, **settings)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert not any(m.training or m._forward_hooks or getattr(m, "gradient_checkpointing", 0) for m in model.modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: flag for n, (flag, _) in before.items()}
    same = [torch.equal(p, before[n][1]) for n, p in model.named_parameters()]
    assert all(same) if fails else not all(same)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 2, "rehearsal": 0.9}, "rehearsal=0.9 of batch_size=2 leaves no place"),
        ({"batch_size": 4, "rehearsal": 0.99}, "rehearsal=0.99 of batch_size=4 leaves no place"),
        ({"muon_lr": 0, "adamw_lr": 0}, "both 0: nothing would be trained"),
        ({"trajectories": 0}, "there is nothing to bake"),
        ({"problems": []}, "there is nothing to bake|rehearsal needs"),
        ({"problems": problems()[:1], "batch_size": 16}, "rehearsal needs 4 training problems, 1 were given"),
        ({"validation": []}, "at least one validation problem"),
        ({"settings": QuietStarSettings()}, "must be a BakingSettings"),
        ({"trajectory": 3}, "did you mean trajectories"),
        *[({name: 0}, f"{name}=0") for name in ("epochs", "batch_size", "max_new_tokens")],
        *[({name: -1}, f"{name}=-1") for name in ("trajectories", "muon_lr", "ce_weight", "rehearsal", "lora_rank")],
    ],
)
def test_what_can_never_bake_is_one_sentence(monkeypatch, settings, words):
    monkeypatch.setattr(b, "sample_trajectories", plain_trajectories)
    model, tokenizer = tiny_lm()
    given = {"problems": problems(size=40), "validation": problems("validation")[:6], "max_new_tokens": 4} | settings
    with pytest.raises(errors.WorkbookError, match=words):
        b.bake(model, tokenizer, [], **given)
