import pytest
import torch
from tiny import tiny_lm, tiny_quiet_star
from transformers import AutoModelForCausalLM

import qs_lib as qs
from qs_lib.errors import ParameterError
from qs_lib.mixing import MixingHead, mix_hidden, mix_log_probs
from qs_lib.model import QuietStarConfig, QuietStarForCausalLM


def open_gate(model, value=1.0):
    torch.nn.init.constant_(model.mixing_head.gate.bias, value)


def test_new_head_is_exactly_the_base_model_and_can_learn():
    head = MixingHead(8)
    base, thought = torch.randn(3, 8), torch.randn(3, 4, 8)
    weights = head(base, thought)
    assert torch.equal(weights, torch.tensor([[1.0, 0, 0, 0, 0]] * 3))
    weights[:, 0].sum().backward()
    assert head.gate.weight.grad.abs().sum() > 0


def test_weights_are_a_distribution_whatever_the_gate_says():
    head = MixingHead(8)
    for bias in (-3.0, 0.4, 7.0):
        torch.nn.init.constant_(head.gate.bias, bias)
        weights = head(torch.randn(5, 8), torch.randn(5, 2, 8))
        assert (weights >= 0).all() and weights.sum(-1).allclose(torch.ones(5))


def test_weights_keep_their_precision_under_autocast():
    head = MixingHead(8)
    torch.nn.init.constant_(head.gate.bias, 0.001)
    base, thought = torch.randn(5, 8), torch.randn(5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            head(base.bfloat16(), thought.bfloat16()), head(base.bfloat16().float(), thought.bfloat16().float())
        )
        assert head(base, thought).sum(-1).allclose(torch.ones(5)) and (head(base, thought)[:, 0] < 1).all()


def test_mixing_by_hand():
    base, thought = torch.tensor([0.8, 0.2]).log(), torch.tensor([[0.1, 0.9], [0.5, 0.5]]).log()
    mixed = mix_log_probs(torch.tensor([0.5, 0.25, 0.25]), base, thought)
    assert mixed.exp().tolist() == pytest.approx([0.55, 0.45])
    hidden = mix_hidden(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([4.0]), torch.tensor([[0.0], [8.0]]))
    assert hidden.item() == 4.0


def test_wrapping_changes_no_logit_and_no_weight():
    lm, tokenizer = tiny_lm()
    ids = torch.tensor([tokenizer.encode("ben has 9 pens .")])
    before = lm(ids).logits
    model = QuietStarForCausalLM.from_base(lm, tokenizer)
    assert torch.equal(model(ids, think=False).logits, before)
    hidden = model.config.hidden_ids
    plain = before.clone()
    plain[..., hidden] = -torch.inf
    thinking = model(ids, think=True).logits
    visible = [i for i in range(thinking.shape[-1]) if i not in hidden]
    assert torch.allclose(thinking[..., visible], plain.log_softmax(-1)[..., visible], atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_save_and_load_are_bit_equal_and_keep_the_head(tmp_path, architecture):
    lm, tokenizer = tiny_lm(architecture)
    model = QuietStarForCausalLM.from_base(lm, tokenizer, num_thoughts=2)
    open_gate(model, 0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, QuietStarForCausalLM) and again.config.num_thoughts == 2
    assert again.mixing_head.gate.bias.item() == 0.5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.lm.get_output_embeddings().weight is again.lm.get_input_embeddings().weight
    fresh = QuietStarForCausalLM(QuietStarConfig(text_config=lm.config, think_token_id=1, end_think_token_id=2))
    assert fresh.mixing_head.gate.weight.abs().sum() == 0


def reference_reply(model, ids, thoughts, steps):
    """No cache, no padding: read text + thought + written text again for every token."""
    written = []
    for _ in range(steps):
        rows = [ids + written] + [ids + t + written for t in thoughts]
        hidden = torch.stack([model.lm.model(torch.tensor([r])).last_hidden_state[0, -1] for r in rows])
        written.append(model.mix(hidden[0], hidden[1:]).argmax().item())
    return written


def test_cached_generation_with_thoughts_equals_a_reference_on_left_padded_rows():
    model, tokenizer = tiny_quiet_star(thought_temperature=0.0, n_true=9)
    open_gate(model)
    texts = ["ben has 9 pens . ben finds 8 .", "tom has 3 .", "a box holds 4 red 5 blue cups ."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    out = model.generate(
        **{k: batch[k] for k in ("input_ids", "attention_mask")},
        max_new_tokens=4,
        do_sample=False,
        min_new_tokens=4,
        return_dict_in_generate=True,
    )
    for row, text in enumerate(texts):
        drawn = out.past_key_values.thoughts[0]
        thoughts = [t[:n] for t, n in zip(drawn.tokens[row, 0].tolist(), drawn.lengths[row, 0].tolist(), strict=True)]
        ids = tokenizer.encode(text)
        written = out.sequences[row, -4:].tolist()
        expected = reference_reply(model, ids, thoughts, 4)
        if tokenizer.eos_token_id not in expected:
            assert written == expected
        assert not set(written) & set(model.config.hidden_ids)


def test_generation_thinks_again_every_n_true_tokens():
    model, tokenizer = tiny_quiet_star(n_true=2)
    ids = torch.tensor([tokenizer.encode("ben has 9 pens .")])
    out = model.generate(
        input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    assert len(out.past_key_values.thoughts) == 3


def test_a_saved_model_does_not_tell_the_folder_it_came_from(tmp_path):
    lm, tokenizer = tiny_lm()
    lm.save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    model.save_pretrained(tmp_path / "wrapped")
    assert str(tmp_path) not in (tmp_path / "wrapped" / "config.json").read_text()


def test_think_false_generates_as_the_base_does():
    model, tokenizer = tiny_quiet_star()
    ids = torch.tensor([tokenizer.encode("ben has 9 pens .")])
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids=ids, think=False, **settings), model.lm.generate(input_ids=ids, **settings)
    )


def test_beams_run_and_keep_rows_apart():
    model, tokenizer = tiny_quiet_star()
    open_gate(model)
    ids = torch.tensor([tokenizer.encode("ben has 9 pens ."), tokenizer.encode("tom has 4 cups .")])
    assert model.generate(input_ids=ids, num_beams=3, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_a_model_without_thinking_tokens_is_one_sentence():
    from tiny import tiny_champion

    with pytest.raises(ValueError, match="call add_thinking_tokens"):
        QuietStarForCausalLM.from_base(*tiny_champion())
    with pytest.raises(ValueError, match="'log_probs' or 'hidden'"):
        QuietStarConfig(mixing="sum")


def test_hidden_mixing_is_available():
    model, tokenizer = tiny_quiet_star(mixing="hidden")
    open_gate(model)
    ids = torch.tensor([tokenizer.encode("ben has 9 pens .")])
    probs = model(ids, logits_to_keep=1).logits.exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)


def test_a_model_is_loaded_where_it_is_wanted(tmp_path, monkeypatch):
    for part in tiny_lm():
        part.save_pretrained(tmp_path)
    assert qs.load_champion(str(tmp_path))[0].device.type == "cpu"
    monkeypatch.setenv("QS_DEVICE", "meta")
    assert qs.load_champion(str(tmp_path))[0].device.type == "meta"
    assert qs.load_champion(str(tmp_path), device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["num_thought", "thought_len", "thoughts_length", "n_tru", "mixin"])
def test_a_misspelt_setting_is_refused_where_a_model_is_made_and_where_it_is_called(name):
    lm, tokenizer = tiny_lm()
    with pytest.raises(ParameterError, match="unknown parameter|did you mean"):
        QuietStarForCausalLM.from_base(lm, tokenizer, **{name: 2})
    if name not in ("n_tru", "mixin"):
        with pytest.raises(ParameterError, match="did you mean"):
            QuietStarConfig(text_config=lm.config, **{name: 2})
    model = QuietStarForCausalLM.from_base(lm, tokenizer)
    with pytest.raises(ParameterError, match="setting of model.config"):
        model(torch.tensor([[5, 6]]), num_thoughts=1)
