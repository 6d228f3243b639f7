"""What a run learnt, stored as its difference to the champion and put back: ``qs.load_run``."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_champion

import qs_lib as qs
from qs_lib import errors
from qs_lib.files import find_run
from qs_lib.training import loop
from qs_lib.training.difference import save_difference
from qs_lib.training.settings import BakingSettings

IDS = torch.tensor([[5, 9, 23, 40, 7, 31, 12, 60]])


@pytest.fixture
def champion(tmp_path, monkeypatch):
    """A champion's folder, and an empty place for runs."""
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path / "outputs"))
    for part in tiny_champion():
        part.save_pretrained(tmp_path / "champion")
    return str(tmp_path / "champion")


def trained(champion, ranks=(2, 3), **settings):
    """A model that two trainings with an adapter moved, one after another, as ``make run`` does, and its tokenizer."""
    pytest.importorskip("peft")
    lm, tokenizer = qs.add_thinking_tokens(*qs.load_champion(champion))
    for rank in ranks:
        with loop.training(lm, tokenizer, BakingSettings(lora_rank=rank)) as adapted:
            optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.005)
            for _ in range(4):
                adapted(input_ids=IDS + 100, labels=IDS + 100).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    settings = {"num_thoughts": 3, "thought_length": 6, "n_true": 2, "thought_temperature": 0.7} | settings
    model = qs.QuietStarForCausalLM.from_base(lm, tokenizer, **settings)
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.4)
    torch.nn.init.constant_(model.gain_head.weight, 0.25)
    torch.nn.init.normal_(model.mixing_head.score.weight, generator=torch.Generator().manual_seed(0))
    return model, tokenizer


def written(model, think):
    torch.manual_seed(0)
    out = model.generate(IDS, max_new_tokens=8, do_sample=False, think=think, return_dict_in_generate=True)
    thoughts = [t.tokens.tolist() for t in out.past_key_values.thoughts] if think else []
    return out.sequences.tolist(), thoughts


def test_a_run_comes_back_as_it_was_trained(champion, tmp_path):
    model, tokenizer = trained(champion)
    folder = tmp_path / "outputs" / "run" / "difference"
    error = save_difference(folder, model, tokenizer, champion, rank=5)
    assert 0 < error < 0.006  # two factors of eight bits each
    again, words = qs.load_run("run")
    base, _ = qs.add_thinking_tokens(*qs.load_champion(champion))
    with torch.no_grad():
        before, expected, found = (m(IDS).logits for m in (base, model.lm, again.lm))
    assert (found - expected).abs().max() < 0.01 * (before - expected).abs().max()
    for name, weight in model.lm.named_parameters():
        assert (again.lm.get_parameter(name) - weight).norm() <= 0.006 * weight.norm(), name
    assert torch.equal(again.gain_head.weight, model.gain_head.weight)
    for name, weight in model.mixing_head.state_dict().items():
        assert torch.equal(again.mixing_head.state_dict()[name], weight.bfloat16().float()), name
    assert again.config.to_dict() == model.config.to_dict() and not again.training
    assert words.get_vocab() == tokenizer.get_vocab() and words.chat_template is None
    assert written(again, False) == written(model, False)
    assert written(again, True) == written(model, True)
    stored = load_file(folder / "difference.safetensors")
    assert {w.dtype for n, w in stored.items() if n != "champion"} == {torch.bfloat16}
    assert json.loads((folder / "difference.json").read_text())["largest_error"] == error


def test_what_is_written_does_not_depend_on_the_callers_draws_and_leaves_them_alone(champion, tmp_path):
    model, tokenizer = trained(champion, ranks=(2,))
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_difference(tmp_path / str(seed), model, tokenizer, champion, rank=1)
        draws.append(torch.rand(1).item())
    first, second = ((tmp_path / name / "difference.safetensors").read_bytes() for name in "12")
    assert first == second and draws[0] != draws[1]


def test_a_smaller_rank_loses_what_it_says(champion, tmp_path):
    """The largest error is that of the best matrix of the rank, by a plain singular value decomposition."""
    model, tokenizer = trained(champion)
    before = dict(qs.add_thinking_tokens(*qs.load_champion(champion))[0].named_parameters())
    worst = 0.0
    for name, weight in model.lm.named_parameters():
        if name.endswith("_proj.weight"):
            values = torch.linalg.svdvals((weight - before[name]).double())
            worst = max(worst, (values[2:].norm() / values.norm()).item())
    error = save_difference(tmp_path / "difference", model, tokenizer, champion, rank=2)
    assert error == pytest.approx(worst, rel=0.01) and error > 0.05


def test_rows_of_an_untied_head_are_kept(tmp_path):
    lm, tokenizer = tiny_champion()
    lm.config.tie_word_embeddings = False
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "champion")
    champion = str(tmp_path / "champion")
    model, tokenizer = trained(champion, ranks=(2,))
    save_difference(tmp_path / "run" / "difference", model, tokenizer, champion, rank=2)
    again, _ = qs.load_run(str(tmp_path / "run"))
    assert again.lm.lm_head.weight is not again.lm.get_input_embeddings().weight
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert again.lm.get_parameter(name).allclose(model.lm.get_parameter(name), rtol=0.005), name


def test_a_run_with_a_whole_model_gives_that():
    model, _ = qs.load_run()
    folder = find_run("") / "quietstar"
    stored = load_file(folder / "model.safetensors")["lm.model.embed_tokens.weight"]
    assert torch.equal(model.lm.get_input_embeddings().weight, stored)
    assert model.config.thought_temperature == json.loads((folder / "config.json").read_text())["thought_temperature"]
    assert torch.equal(qs.load_run("pocket")[0](IDS, think=False).logits, model(IDS, think=False).logits)


def one_sentence(kind, words, call):
    with pytest.raises(kind, match=words) as caught:
        call()
    assert isinstance(caught.value, errors.WorkbookError) and "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_one_sentence(champion, tmp_path):
    load = lambda: qs.load_run("run")
    one_sentence(errors.UpstreamError, "no run 'run' .*make run RUN=run", load)
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    one_sentence(errors.UpstreamError, "no trained model.*make run RUN=run", load)
    save_difference(run / "difference", *trained(champion, ranks=(2,)), champion, rank=2)
    shutil.copytree(champion, tmp_path / "kept")
    shutil.rmtree(champion)
    one_sentence(errors.SourceError, f"there is no folder {champion}", load)
    other, tokenizer = tiny_champion(seed=1)
    for part in (other, tokenizer):
        part.save_pretrained(champion)
    one_sentence(errors.SourceError, "not the model that run was trained from", load)
    for part in tiny_champion("qwen2"):
        part.save_pretrained(champion)
    one_sentence(errors.SourceError, "not the model that run was trained from", load)
    (run / "difference" / "difference.safetensors").write_bytes(b"half")
    one_sentence(errors.UpstreamError, "cannot be read", load)


def test_what_no_adapter_does_is_not_stored(champion, tmp_path):
    folder = tmp_path / "difference"
    model, tokenizer = trained(champion, ranks=())
    save = lambda: save_difference(folder, model, tokenizer, champion)
    for weight in (model.lm.model.norm.weight, model.lm.get_input_embeddings().weight):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[3] += 1
        one_sentence(errors.WorkbookError, "no adapter does: save the whole model", save)
        assert not folder.exists()
        with torch.no_grad():
            weight.copy_(kept)
    assert save() == 0 and folder.exists()
    other, tokenizer = tiny_champion("qwen2")
    other = qs.QuietStarForCausalLM.from_base(*qs.add_thinking_tokens(other, tokenizer))
    save = lambda: save_difference(folder, other, tokenizer, champion)
    one_sentence(errors.SourceError, "was not trained from", save)
    one_sentence(errors.ParameterError, "rank is 0", lambda: save_difference(folder, other, tokenizer, champion, 0))
