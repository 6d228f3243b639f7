"""What users of transformers and peft do with a model: it equals a reference, or one sentence says what works."""

import shlex
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from tiny import tiny_champion, tiny_lm, tiny_quiet_star
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, Trainer, TrainingArguments, pipeline

import qs_lib as qs

TEXTS = ["ben has 9 pens . ben finds 8 .", "tom has 3 .", "a box holds 4 red 5 blue cups .", "tom has 4 cups ."]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def model_of(**settings):
    model, tokenizer = tiny_quiet_star(thought_temperature=0.0, **settings)
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.5)
    return model, tokenizer


@pytest.fixture(scope="module")
def given():
    """A model, the ids of one text, and its log-probs while thinking."""
    model, tokenizer = model_of()
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    return model, ids, model(ids).logits.detach()


def rows(tokenizer, ignored=0):
    """Eight padded rows. ``ignored``: of every third row, how many labels more than of the row before it."""
    found = []
    for i, ids in enumerate(map(tokenizer.encode, TEXTS * 2)):
        pad, off = 12 - len(ids), ignored * (i % 3)
        labels = [-100] * (pad + off) + ids[off:]
        found.append({"input_ids": [0] * pad + ids, "attention_mask": [0] * pad + [1] * len(ids), "labels": labels})
    return found


def trainer_of(model, data, folder, batch=8, **more):
    own_loss = more.pop("compute_loss_func", None)
    settings = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch, "use_cpu": True}
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, **settings | more)
    return Trainer(model, args, train_dataset=Dataset.from_list(data), compute_loss_func=own_loss)


def by_hand(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def batch_of(data):
    return {name: torch.tensor([row[name] for row in data]) for name in data[0]}


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize(
    "more",
    [{}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}, {"compute_loss_func": by_hand}],
    ids=lambda more: next(iter(more), "plain"),
)
def test_a_trainer_has_the_same_loss_however_the_batch_is_cut(think, more, tmp_path):
    seen = []
    for batch in (8, 4, 1):
        model, tokenizer = model_of(think=think)
        trainer = trainer_of(model, rows(tokenizer, ignored=1), tmp_path, batch, **more)
        trainer.train()
        seen.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert seen[1] == pytest.approx(seen[0], rel=1e-4) and seen[2] == pytest.approx(seen[0], rel=1e-4)
    inputs = batch_of(rows(tokenizer, ignored=1))
    labels = inputs.pop("labels")
    log_probs = model(**inputs).logits.log_softmax(-1)[:, :-1].flatten(0, 1)
    truth = labels[:, 1:].flatten()
    expected = cross_entropy(log_probs, truth)
    if smoothing := more.get("label_smoothing_factor"):
        floored = log_probs.clamp_min(-30)  # what a thinking token has there, in place of -inf
        expected = (1 - smoothing) * expected - smoothing * floored[truth != -100].mean()
    assert seen[0][0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("think", [True, False])
def test_a_trainer_predicts_and_evaluates_and_goes_on_from_a_checkpoint(think, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-3}
    model, tokenizer = model_of(think=think)
    data = rows(tokenizer)
    trainer = trainer_of(model, data, tmp_path, **saving)
    trainer.train()
    again, _ = model_of(think=think, seed=3)
    resumed = trainer_of(again, data, tmp_path / "again", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    expected = model(**batch_of(data))
    assert trainer.evaluate(Dataset.from_list(data))["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    predictions = trainer.predict(Dataset.from_list(data)).predictions
    assert torch.allclose(torch.tensor(predictions), expected.logits, atol=1e-4)


def test_labels_are_ignored_where_they_say_so(given):
    model, ids, log_probs = given
    labels = ids.clone()
    labels[:, :4] = -100
    assert model(ids, labels=labels).loss.item() == pytest.approx(cross_entropy(log_probs[0, 3:-1], ids[0, 4:]).item())
    nothing = torch.full_like(ids, -100)
    assert all(model(ids, labels=nothing, think=think).loss.isnan() for think in (True, False))  # as transformers
    assert model(ids, labels=nothing, num_items_in_batch=torch.tensor(7)).loss == 0
    labels[:, 5] = model.config.hidden_ids[2]
    with pytest.raises(ValueError, match="labels hold thinking tokens.* set them to -100"):
        model(ids, labels=labels)
    assert model(ids, labels=labels.masked_fill(labels == model.config.hidden_ids[2], -100)).loss.isfinite()


KEPT = {
    "list": torch.tensor([1, 3]),
    "from the end": torch.tensor([-1, 1]),
    "twice": torch.tensor([2, 2, 4]),
    "mask": torch.arange(9) > 4,
    "number": 2,
    "more than there are": 99,
}


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_kept_positions_are_those_of_the_whole_and_have_its_loss(given, kept, think):
    model, ids, log_probs = given
    whole = log_probs if think else model(ids, think=False).logits
    where = slice(-kept, None) if isinstance(kept, int) else kept
    found = model(ids, logits_to_keep=kept, labels=ids, think=think)
    assert torch.allclose(found.logits, whole[:, where], atol=1e-5)
    truth = torch.cat([ids[0, 1:], torch.tensor([-100])])[where]
    assert found.loss.item() == pytest.approx(cross_entropy(whole[0, where], truth).item(), rel=1e-5)


def embedded(model, ids):
    return model.get_input_embeddings()(ids)


# What thinking does not know, and the same with what the sentence advises.
REFUSED = {
    "embeddings": lambda m, ids, **how: m(inputs_embeds=embedded(m, ids), **how),
    "embeddings generated from": lambda m, ids, **how: m.generate(inputs_embeds=embedded(m, ids), **GREEDY, **how),
    "hidden states": lambda m, ids, **how: m(ids, output_hidden_states=True, **how),
    "hidden states of a reply": lambda m, ids, **how: m.generate(
        ids, output_hidden_states=True, return_dict_in_generate=True, **GREEDY, **how
    ),
    "a square mask": lambda m, ids, **how: m(ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool), **how),
    "packed texts": lambda m, ids, **how: m(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), **how),
    "shifted positions": lambda m, ids, **how: m(ids, position_ids=torch.arange(3, 12)[None], **how),
    "a lookup": lambda m, ids, **how: m.generate(ids, prompt_lookup_num_tokens=2, **GREEDY, **how),
    "guidance": lambda m, ids, **how: m.generate(ids, guidance_scale=1.5, **GREEDY, **how),
    "guidance of a configuration": lambda m, ids, **how: m.generate(
        ids, GenerationConfig(guidance_scale=2.0, max_new_tokens=3), **how
    ),
    "another prompt": lambda m, ids, **how: m.generate(
        ids, guidance_scale=1.5, negative_prompt_ids=ids[:, :3], **GREEDY, **how
    ),
    "an assistant": lambda m, ids, **how: m.generate(ids, assistant_model=m.lm, **GREEDY, **how),
    "an early exit": lambda m, ids, **how: m.generate(ids, assistant_early_exit=1, **GREEDY, **how),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_thinking_does_not_know_is_one_sentence_whose_advice_works(given, call):
    model, ids, _ = given
    with pytest.raises(ValueError, match="^thinking does not know .*: leave it out, or set think=False$"):
        call(model, ids)
    call(model, ids, think=False)


def test_without_thoughts_it_writes_what_the_wrapped_model_writes(given):
    model, ids, _ = given
    for more in ({"guidance_scale": 1.5}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(ids, think=False, **GREEDY, **more), model.lm.generate(ids, **GREEDY, **more))
    assert model.generate(ids, guidance_scale=1.0, **GREEDY).shape == (1, 14)
    for think in (True, False):
        with pytest.raises(ValueError, match="tmeperature"):
            model.generate(ids, tmeperature=1.0, think=think)


def test_states_that_a_configuration_asks_for(given):
    model, ids = model_of()[0], given[1]
    model.config.output_hidden_states = True
    assert len(model(ids, think=False).hidden_states) == 3 and model(ids, output_hidden_states=False).logits is not None
    with pytest.raises(ValueError, match="thinking does not know output_hidden_states"):
        model(ids)


def test_a_model_that_thinks_is_not_wrapped_again(given):
    with pytest.raises(ValueError, match="model.lm"):
        qs.QuietStarForCausalLM.from_base(given[0])
    assert qs.QuietStarForCausalLM.from_base(given[0].lm).lm is given[0].lm


def test_no_text_is_one_sentence(given):
    model, ids, _ = given
    for empty in (ids[:0], ids[:, :0], None):
        with pytest.raises(ValueError, match="no text to think about"):
            model(empty)
    padding = {"input_ids": torch.zeros_like(ids), "attention_mask": torch.zeros_like(ids)}
    assert model(**padding).logits.isfinite().any()  # a row of padding in a training batch costs nothing
    with pytest.raises(ValueError, match="a prompt is padding only"):
        model.generate(**padding, **GREEDY)
    with pytest.raises(ValueError, match="all padding"):
        model.generate(padding["input_ids"], **GREEDY)


def test_a_loop_of_ones_own_writes_what_generate_writes(given):
    model, ids, log_probs = given
    out, written = model(ids, use_cache=True), []
    assert torch.allclose(out.logits, log_probs)
    for _ in range(5):
        written.append(out.logits[0, -1].argmax().item())
        out = model(torch.tensor([written[-1:]]), past_key_values=out.past_key_values)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    assert written[: len(expected)] == expected


def test_a_cache_is_not_read_the_other_way(given):
    model, ids, _ = given
    thinking = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="filled while thinking: leave it out, or set think=True"):
            call(thinking.sequences, past_key_values=thinking.past_key_values, think=False)
        with pytest.raises(ValueError, match="did not fill"):
            call(ids, past_key_values=model(ids[:, :4], think=False, use_cache=True).past_key_values)
    assert model(ids, past_key_values=DynamicCache(), think=False).logits.shape[1] == ids.shape[1]


def test_beams_and_many_replies_are_those_without_a_cache():
    model, tokenizer = model_of(n_true=1)
    batch = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    cached, plain = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert len(cached) == 4 and torch.equal(cached, plain)


def test_tuples_are_the_same_numbers(given):
    model, ids, log_probs = given
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert torch.equal(logits, log_probs) and loss == model(ids, labels=ids).loss


def test_pipelines_write_with_and_without_thoughts(given):
    model, ids, _ = given
    write = pipeline("text-generation", model=model, tokenizer=tiny_lm()[1])
    for think in (True, False):
        (reply,) = write(TEXTS[0], max_new_tokens=4, do_sample=False, think=think, return_tensors=True)
        expected = model.generate(ids, max_new_tokens=4, do_sample=False, think=think)
        assert reply["generated_token_ids"] == expected[0].tolist()


def test_a_loaded_model_has_its_dtype_device_and_way_of_writing(given, tmp_path):
    model, ids, log_probs = model_of()[0], *given[1:]
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(again(ids).logits, log_probs)
    for think in (True, False):
        assert again.generate(ids, think=think, min_new_tokens=3).shape[1] == ids.shape[1] + 3
    for dtype in (torch.bfloat16, torch.float16):
        small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert (small.lm.dtype, small.mixing_head.features.weight.dtype) == (dtype, torch.float32)
        # a greedy thought is another one where two tokens all but tie: those places tell nothing of the dtype
        same = (small.think(ids).tokens == model.think(ids).tokens).flatten(2).all(-1)
        assert same.float().mean() > 0.7
        assert (small(ids).logits.exp() - log_probs.exp())[same].abs().max() < 1e-3


def test_embeddings_are_changed_in_the_wrapped_model():
    model, tokenizer = model_of()
    ids = torch.tensor([tokenizer.encode(TEXTS[1])])
    before = model(ids, think=False).logits
    model.resize_token_embeddings(190, mean_resizing=False)
    assert model.config.vocab_size == model.lm.config.vocab_size == model(ids).logits.shape[-1] == 190
    assert torch.allclose(model(ids, think=False).logits[..., : before.shape[-1]], before, atol=1e-5)
    assert model(ids).logits.exp().sum(-1).allclose(torch.ones(1), atol=1e-4)
    model.set_input_embeddings(torch.nn.Embedding(190, 32))
    model.tie_weights()
    assert model.lm.get_output_embeddings().weight is model.get_input_embeddings().weight


def adapted(lm, **settings):
    peft = pytest.importorskip("peft")
    given = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(lm, peft.LoraConfig(**given | settings)).eval()


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "use_rslora": True}], ids=str)
def test_thoughts_of_an_adapter_are_those_of_the_merged_model(more):
    lm, tokenizer = tiny_lm()
    ids, found = torch.tensor([tokenizer.encode(TEXTS[0])]), []
    model = adapted(lm, **more)
    for one in (model, model.merge_and_unload()):
        thoughts = qs.generate_thoughts(one, ids, num_thoughts=2, thought_length=5, temperature=0.0)
        found.append((thoughts.tokens, thoughts.logprobs, qs.rescore_thoughts(one, ids, thoughts).thought_logprobs))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))


def test_an_adapter_goes_around_the_model_and_not_inside(given, tmp_path):
    ids = given[1]
    lm, tokenizer = tiny_lm()
    inside = adapted(lm)
    for wrong in (inside, inside.get_base_model()):
        with pytest.raises(ValueError, match="merge it first .merge_and_unload., or .* put the adapter around both"):
            qs.QuietStarForCausalLM.from_base(wrong, tokenizer)
    merged = qs.QuietStarForCausalLM.from_base(inside.merge_and_unload(), tokenizer)
    merged.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids, think=False).logits, merged(ids, think=False).logits
    )
    around = adapted(model_of()[0], target_modules=["q_proj", "v_proj"])
    logits = around(input_ids=ids).logits
    assert around.generate(input_ids=ids, **GREEDY).shape == (1, 14)
    assert torch.allclose(around.merge_and_unload()(ids).logits, logits, atol=1e-4)


def test_prompts_that_are_learned_are_not_silently_left_out(given):
    peft = pytest.importorskip("peft")
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        settings = kind(num_virtual_tokens=3, task_type="CAUSAL_LM")
        with pytest.raises(NotImplementedError, match="in a way parallel thoughts do not know"):
            qs.generate_thoughts(peft.get_peft_model(tiny_lm()[0], settings), given[1])
        around = peft.get_peft_model(model_of()[0], settings)
        with pytest.raises(ValueError, match="think=False"):
            around(input_ids=given[1])
        assert around(input_ids=given[1], think=False).logits.isfinite().all()


@pytest.mark.parametrize("own_words", [True, False], ids=["its own tokenizer", "its base's"])
def test_an_adapter_is_refused_as_champion_and_the_command_makes_one(own_words, tmp_path):
    lm, tokenizer = tiny_champion()
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    base, folder = tmp_path / "the base", tmp_path / "my adapter"
    for part in (lm, tokenizer):
        part.save_pretrained(base)
    adapter = adapted(lm, target_modules=["q_proj", "v_proj"])
    adapter.peft_config["default"].base_model_name_or_path = str(base)
    adapter.save_pretrained(folder)
    if own_words:
        tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match="is an adapter of .*the base: merge them, then load .*my adapter-merged"
    ) as told:
        qs.load_champion(str(folder))
    python, *words = shlex.split(str(told.value).splitlines()[-1])
    assert (python, words[0]) == ("python", "-c")
    if own_words:
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
    else:  # the same words, without another start of Python
        exec(words[1], {})  # noqa: S102 (a command of ours, as a user runs it)
    model, words = qs.load_champion(f"{folder}-merged")
    assert torch.allclose(model(ids).logits, adapter(input_ids=ids).logits, atol=1e-5)
    assert words.get_vocab() == tokenizer.get_vocab() and all(p.requires_grad for p in model.parameters())


def test_a_learned_prompt_is_refused_as_champion(tmp_path):
    peft = pytest.importorskip("peft")
    lm = tiny_champion()[0]
    peft.get_peft_model(lm, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="a learned prompt, which cannot be part of a model"):
        qs.load_champion(str(tmp_path))
