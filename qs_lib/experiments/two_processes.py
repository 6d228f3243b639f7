"""A training small enough to try several processes with, and whether they end where one process ends.

In two processes, ``torchrun --standalone --nproc_per_node 2 -m qs_lib.experiments.two_processes outputs/two``. In one,
``python -m qs_lib.experiments.two_processes outputs/one``.
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
from ..training.pretrain import corpus, pretrain

BOUND = 1e-3  # on a weight: Muon orthogonalises in bfloat16, where the order of a sum shows


def train(folder: Path, steps: int = 6, seed: int = 0) -> None:
    """Train a tiny random model in all processes of torchrun, or in one where it was not used.

    The first process saves the model. Each writes ``rank-N.json``: the number of ``processes``, its ``weights_sha256``.
    """
    distributed.start()
    tokenizer = build_tokenizer("pocket", [])
    model = build_champion(tokenizer, hidden_size=32, layers=2, heads=2, intermediate_size=48, seed=seed)
    texts = corpus(pocket.generate("train", 60, seed=seed), seed)
    pretrain(model, tokenizer, texts, steps=steps, batch_size=8, seed=seed)  # 8 texts of all processes together
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.first():
        model.save_pretrained(folder)
    report = {"processes": distributed.count(), "weights_sha256": distributed.checksum(model)}
    write_bytes(folder / f"rank-{distributed.rank()}.json", to_json(report).encode())


def torchrun(processes: int, folder: Path, steps: int = 6, seed: int = 0) -> list[dict]:
    """Run :func:`train` in so many processes and return their reports. Raises ``WorkbookError`` if it fails."""
    words = f"--standalone --nproc_per_node {processes} -m {__name__}".split()
    words += [str(folder), "--steps", str(steps), "--seed", str(seed)]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        again = f"see all of it with `torchrun {' '.join(words)}`"
        raise WorkbookError(f"torchrun ended with {done.returncode} ({last}); {again}")
    return [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(processes)]


def largest_weight_difference(one: Path, other: Path) -> float:
    """Return the largest difference of any weight of two saved models."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max((first[name] - second[name]).abs().max().item() for name in first)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, under torchrun or alone."""
    description = "A tiny training, in one process or several."
    parser = argparse.ArgumentParser(prog="python -m qs_lib.experiments.two_processes", description=description)
    parser.add_argument("folder", type=Path, help="where the model and what each process says go")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    train(given.folder, given.steps, given.seed)


if __name__ == "__main__":
    main()
    if distributed.count() > 1:
        distributed.dist.barrier()  # gloo may abort when one leaves before the other
        distributed.dist.destroy_process_group()
