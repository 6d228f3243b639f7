"""Where the time of reinforcement goes: shares of CPU seconds by part of a step, on the committed pocket model.

python tests/benchmarks/profile_rl.py [STEPS=20] [THREADS=1]
"""

import functools
import sys
import time
from collections import defaultdict

import torch

from qs_lib.champion import load_champion
from qs_lib.evaluation.accuracy import read_problems
from qs_lib.experiments.reinforcement import rl_recipe
from qs_lib.files import find_run
from qs_lib.model import QuietStarForCausalLM
from qs_lib.training import reinforce

PARTS = (
    ("sampling thoughts", reinforce, "generate_thoughts"),
    ("re-scoring, policy and reference", reinforce, "rescore_thoughts"),
    ("choosing problems, tokens", reinforce, "think_where"),
    ("which thoughts disagree", reinforce, "disagreement"),
    ("backward", torch.Tensor, "backward"),
    ("optimizer", reinforce.MuonGrokfast, "step"),
    ("validation", reinforce, "validate"),
)


def main(steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    seconds, inside = defaultdict(float), []

    def timed(name, function):
        @functools.wraps(function)
        def call(*args, **options):
            started = time.process_time()
            inside.append(name)
            try:
                return function(*args, **options)
            finally:
                inside.pop()
                if not inside:  # thoughts that validation samples are validation
                    seconds[name] += time.process_time() - started

        return call

    run = find_run("")
    lm, tokenizer = load_champion(str(run / "03_baking" / "baked"))
    train, validation = (read_problems(run / "02_dataset_generation" / f"{s}.parquet") for s in ("train", "validation"))
    for name, owner, attribute in PARTS:
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    settings = rl_recipe() | {"steps": steps, "evaluate_every": max(1, steps // 2)}
    started = time.process_time()
    reinforce.train_quiet_star(QuietStarForCausalLM.from_base(lm, tokenizer), tokenizer, train, validation, **settings)
    whole = time.process_time() - started
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{name:34} {100 * spent / whole:5.1f} %")
    print(f"{'the rest':34} {100 * (whole - sum(seconds.values())) / whole:5.1f} %")
    print(f"{1000 * (whole - seconds['validation']) / steps:.0f} ms of CPU a step, {threads} thread(s)")


if __name__ == "__main__":
    given = [int(x) for x in sys.argv[1:]]
    main(*given, *(20, 1)[len(given) :])
