"""``python -m qs_lib.experiments NAME``: run an experiment on the models and problems of a run.

It writes ``outputs/<run>/experiments/NAME.csv`` and goes on where it was stopped.
"""

import argparse
import sys

import torch

from ..files import find_run, run_folder
from ..workbook.params import read_variant
from ..workbook.run import exit_code
from . import anywhere, baking, chain, grokking, real_model, reinforcement, solutions, zoo

EXPERIMENTS = {
    "baking": baking.baking,
    "chain": chain.chain,
    "optimizers": baking.optimizers,
    "grokking": grokking.grokking,
    "look_ahead": reinforcement.look_ahead,
    "rl": reinforcement.reinforcement,
    "zoo": zoo.zoo,
    "anywhere": anywhere.anywhere,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment; its options are on the command line."""
    about = "Run one experiment: arms x seeds. A variant's name runs the arms of a pretrained model with its recipes."
    parser = argparse.ArgumentParser(prog="python -m qs_lib.experiments", description=about)
    parser.add_argument("name", help=f"{', '.join(EXPERIMENTS)}, or a variant for a pretrained model")
    parser.add_argument("--upstream", default="", help="run whose models and problems are read, by default pocket")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="", help="folder or file of problems, for a pretrained model")
    parser.add_argument("--gsm8k", default="", help="folder of GSM8K, whose test problems are then answered too")
    parser.add_argument("--arms", nargs="+", choices=real_model.TRAINED_ARMS, metavar="ARM", help="these arms alone")
    parser.add_argument("--texts", action="store_true", help="thoughts inside GSM8K's solutions, not after questions")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.name in EXPERIMENTS:
        run = find_run(given.upstream)
        EXPERIMENTS[given.name](run, run / "experiments", given.seeds)
        return
    read_variant(given.name)  # whose name may be misspelt
    folder = run_folder(given.upstream or given.name) / "experiments"
    if given.texts:
        solutions.solutions(folder, given.seeds, given.name, given.gsm8k)
        return
    real_model.real_model(folder, given.seeds, given.name, given.data, given.gsm8k, given.arms)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main() or 0, "the same command continues with the arms that are missing"))
