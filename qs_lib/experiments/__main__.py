"""``python -m qs_lib.experiments NAME``: run an experiment on the models and problems of a run.

It writes ``outputs/<run>/experiments/NAME.csv`` and goes on where it was stopped.
"""

import argparse

import torch

from ..files import find_run
from . import baking, chain, grokking, reinforcement

EXPERIMENTS = {
    "baking": baking.baking,
    "chain": chain.chain,
    "optimizers": baking.optimizers,
    "grokking": grokking.grokking,
    "look_ahead": reinforcement.look_ahead,
    "rl": reinforcement.reinforcement,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment; its options are on the command line."""
    about = "Run one experiment: arms x seeds."
    parser = argparse.ArgumentParser(prog="python -m qs_lib.experiments", description=about)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--upstream", default="pocket", help="run whose models and problems are read")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    run = find_run(given.upstream)
    EXPERIMENTS[given.name](run, run / "experiments", given.seeds)


if __name__ == "__main__":
    main()
