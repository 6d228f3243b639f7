"""The variants for real models, end to end, on models of their shapes at small width: whatever breaks would break there too.

    python tests/rehearse.py DATA [VARIANT ...] [--layers N]        (make rehearse DATA=folder)

Qwen2.5-0.5B and -7B as they are in layers (unless fewer are asked for), heads, key heads, tied or own output matrix and its
unused rows, with a few numbers a head and a tokenizer trained on the folder's train.jsonl. Each is trained until it writes thoughts
at all, one of a few whatever it is asked, saved, and given to `python -m qs_lib.workbook.run` as MODEL with the variant's own parameters; only
sizes are set lower. Prints one line a stage and the scoreboard's count; exit code 1 if a stage failed. Nothing the models say is
worth reading.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import qs_lib as qs
from qs_lib.champion import build_tokenizer
from qs_lib.data.strategies import PROMPTS
from qs_lib.files import REPOSITORY
from qs_lib.training.pretrain import corpus, pretrain

HEAD = 4  # numbers a head, in place of 64 and 128
SHAPES = {
    "gsm8k-qwen2.5-0.5b": {
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864 * HEAD // 64,
        "tie_word_embeddings": True,
    },
    "gsm8k-qwen2.5-7b": {
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944 * HEAD // 128,
        "tie_word_embeddings": False,
    },
}
UNUSED_ROWS = 271  # of Qwen2.5's embedding matrix: 151,936 rows, 151,665 tokens
TEMPLATE = (
    "{% for m in messages %}Question: {{ m.content }}\n{% endfor %}"  # of one of the two, as of an instruction model
)
STEPS = 120  # of training, after which it closes its thoughts
SIZES = [
    "01.eval_problems=8",
    "02.validation_problems=48",
    "02.test_problems=48",
    "03.epochs=1",
    "03.examples=32",
    "03.trajectories=16",
    "03.batch_size=8",
    "03.eval_problems=8",
    "03.max_new_tokens=80",
    "04.problems=4",
    "05.steps=2",
    "05.batch_size=2",
    "05.eval_problems=4",
    "05.test_problems=4",
    "05.evaluate_every=1",
    "06.problems=4",
    "07.repeats=1",
]


def documents_of(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each strategy's shortest thought as the reply to every question's last sentence: the form is learnt in a minute of one core,
    arithmetic would take hours."""
    asked = [
        (prompt, context, reply)
        for context, reply in documents
        for prompt in PROMPTS.values()
        if context.startswith(prompt) and reply.startswith("think")
    ]
    shortest = {}
    for prompt, _, reply in asked:
        shortest[prompt] = min(shortest.get(prompt, reply), reply, key=len)
    return [(f"{prompt} {re.split(r'(?<=[.?!]) +', context)[-1]}", shortest[prompt]) for prompt, context, _ in asked]


def build(variant: str, data: str, folder: Path, layers: int | None) -> None:
    """A model of the variant's shape that writes thoughts, with its tokenizer, into ``folder``."""
    torch.manual_seed(0)
    documents = corpus(list(qs.load_problems(data, "train")), direct=0.0, facts=0.0)
    tokenizer = build_tokenizer(data, [" ".join(d) for d in documents], 1024)
    if "7b" in variant:
        tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 32768
    shape = SHAPES[variant] | ({"num_hidden_layers": layers} if layers else {})
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(tokenizer) + UNUSED_ROWS,
            hidden_size=HEAD * shape["num_attention_heads"],
            max_position_embeddings=32768,
            rope_theta=1e6,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
    )
    pretrain(model, tokenizer, documents_of(documents), steps=STEPS, batch_size=8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rehearse(variant: str, data: str, folder: Path, layers: int | None) -> bool:
    """One line for the model, one a stage, and the scoreboard's count; whether all of it ran."""
    started = time.monotonic()
    build(variant, data, folder / "model", layers)
    print(f"{variant}: a model of its shape, {time.monotonic() - started:.0f} s", flush=True)
    sizes = SIZES + (["01.chat_template=true"] if "7b" in variant else [])
    command = [
        sys.executable,
        "-m",
        "qs_lib.workbook.run",
        "--variant",
        variant,
        "--run",
        "rehearsal",
        "--data",
        data,
        "--champion",
        str(folder / "model"),
        "--set",
        *sizes,
    ]
    driver = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=os.environ | {"QS_OUTPUTS": str(folder)}
    )
    for line in driver.stdout:
        if re.match(r"\d\d_\w+: done|reached:", line):
            print(f"{variant}: {line}", end="", flush=True)
    return driver.wait() == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The variants for real models, end to end, on models of their shapes at small width."
    )
    parser.add_argument("data", help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"some of {', '.join(SHAPES)}; default: all")
    parser.add_argument("--layers", type=int, help="so many in place of the model's own")
    options = parser.parse_args()
    if unknown := set(options.variants) - set(SHAPES):
        parser.error(f"no shape is known for {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    ran = []
    for variant in options.variants or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            ran.append(rehearse(variant, str(Path(options.data).resolve()), Path(folder), options.layers))
    return int(not all(ran))


if __name__ == "__main__":
    raise SystemExit(main())
