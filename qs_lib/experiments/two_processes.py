"""A training small enough to try several processes with, and whether they end where one process ends.

    torchrun --standalone --nproc_per_node 2 -m qs_lib.experiments.two_processes outputs/two
    python -m qs_lib.experiments.two_processes outputs/one

On two machines the same command on each, with the first one's name and a folder that both see:
``torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id 1 --rdzv_endpoint HOST:29500 -m qs_lib.experiments.two_processes FOLDER``.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from ..champion import build_champion, build_tokenizer
from ..data import pocket
from ..errors import WorkbookError
from ..files import REPOSITORY, to_json, write_bytes
from ..training import distributed
from ..training.distributed import part, whole_state
from ..training.pretrain import corpus, pretrain

WAYS = {"averaged": False, "sharded": True}  # folder -> fsdp
BOUND = 1e-3  # on a weight: Muon orthogonalises in bfloat16, where the order of a sum shows


def train(folder: Path, steps: int = 6, fsdp: bool = False, seed: int = 0) -> None:
    """Train a tiny random model in all processes of torchrun, or in one where it was not used. The first saves the model;
    each writes ``rank-N.json``: ``processes``, the ``weights_sha256`` it ends with, and how many weights it ``held``."""
    distributed.start()
    tokenizer = build_tokenizer("pocket", [])
    model = build_champion(tokenizer, hidden_size=32, layers=2, heads=2, intermediate_size=48, seed=seed)
    texts = corpus(pocket.generate("train", 60, seed=seed), seed)
    pretrain(model, tokenizer, texts, steps, batch_size=8, fsdp=fsdp, seed=seed)  # 8 texts of all processes together
    weights = whole_state(model)  # all processes must call it
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.first():
        model.save_pretrained(folder, state_dict=weights)
    report = {
        "processes": distributed.count(),
        "weights_sha256": distributed.checksum(model),
        "held": sum(part(p).numel() for p in model.parameters()),
    }
    write_bytes(folder / f"rank-{distributed.rank()}.json", to_json(report).encode())


def torchrun(processes: int, folder: Path, steps: int = 6, seed: int = 0) -> dict[str, list[dict]]:
    """:func:`train` in that many processes of this machine, with whole weights into ``folder/averaged`` and sharded ones into
    ``folder/sharded``; what each process reports of both. Raises WorkbookError."""
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        __name__,
        str(folder),
        "--steps",
        str(steps),
        "--seed",
        str(seed),
    ]
    done = subprocess.run([sys.executable, *words], check=False, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise WorkbookError(
            f"torchrun ended with {done.returncode} ({last}); see all of it with `torchrun {' '.join(words[2:])}`"
        )
    return {
        way: [json.loads((folder / way / f"rank-{number}.json").read_text()) for number in range(processes)]
        for way in WAYS
    }


def largest_difference(one: Path, other: Path) -> float:
    """Of any weight of two saved models."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max((first[name] - second[name]).abs().max().item() for name in first)


def main(arguments: list[str] | None = None) -> None:
    """The command line, under torchrun or alone."""
    parser = argparse.ArgumentParser(
        prog="python -m qs_lib.experiments.two_processes",
        description="A tiny training, with whole weights and with sharded ones, in one process or several.",
    )
    parser.add_argument("folder", type=Path, help="where the model and what each process says go")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for way, fsdp in WAYS.items():
        train(given.folder / way, given.steps, fsdp, given.seed)


if __name__ == "__main__":
    main()
    if distributed.count() > 1:
        distributed.dist.barrier()  # gloo may abort when one leaves before the other
        distributed.dist.destroy_process_group()
