"""What a busy neighbour costs: wall time of a step of each training of the pocket run, alone and beside another program.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_neighbour.py [--steps 20] [--repeats 3]

Recipes are those of the variant `pocket`, models and problems those of the committed run. Alone and beside a program that
keeps one core busy take turns. A step is the time from one update to the next, medians over all repetitions.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time

import qs_lib as qs
from qs_lib.champion import build_champion, build_tokenizer
from qs_lib.data.problems import baking_data
from qs_lib.data.strategies import PROMPTS
from qs_lib.evaluation.accuracy import read_problems
from qs_lib.experiments.reinforcement import rl_recipe
from qs_lib.files import find_run
from qs_lib.training.optim import MuonGrokfast
from qs_lib.training.pretrain import corpus, pretrain
from qs_lib.training.reinforce import train_quiet_star
from qs_lib.training.settings import BakingSettings, PretrainSettings, QuietStarSettings
from qs_lib.workbook.params import recipe

BUSY = "while True: pass"


def champion(steps: int) -> None:
    values = recipe("01_token_setup", "pocket")
    training = list(qs.load_problems("pocket", "train", 2000, 100, distinct=False))
    documents = corpus(training, 0, values["direct_share"])
    tokenizer = build_tokenizer("pocket", [" ".join(d) for d in documents])
    shape = (values[k] for k in ("architecture", "hidden_size", "layers", "heads", "intermediate_size"))
    pretrain(build_champion(tokenizer, *shape, 0), tokenizer, documents, PretrainSettings.among(values, steps=steps))


def baking(steps: int) -> None:
    values, run = recipe("03_baking", "pocket"), find_run("")
    model, tokenizer = qs.load_champion(str(run / "01_token_setup" / "champion"))
    read = {
        s: read_problems(run / "02_dataset_generation" / f"{s}.parquet") for s in ("examples", "train", "validation")
    }
    s = BakingSettings.among(values, epochs=1, trajectories=0)
    worked, unseen = baking_data(read["examples"], read["train"], steps * s.batch_size, values["hard_shown"], 0)
    qs.bake(model, tokenizer, worked, unseen[:200], read["validation"][:8], s, PROMPTS)


def reinforcement(steps: int) -> None:
    run = find_run("")
    lm, tokenizer = qs.load_champion(str(run / "03_baking" / "baked"))
    train, validation = (read_problems(run / "02_dataset_generation" / f"{s}.parquet") for s in ("train", "validation"))
    model, s = qs.QuietStarForCausalLM.from_base(lm, tokenizer), QuietStarSettings(**rl_recipe())
    train_quiet_star(model, tokenizer, train, validation[:8], s.but(steps=steps, evaluate_every=steps))


def seconds_a_step(training, steps: int, busy: bool) -> list[float]:
    """Return the times between the updates of a training."""
    taken, update = [], MuonGrokfast.step

    def step(self, *given, **options):
        found = update(self, *given, **options)
        taken.append(time.monotonic())
        return found

    neighbour = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    MuonGrokfast.step = step
    try:
        training(steps)
    finally:
        MuonGrokfast.step = update
        if neighbour:
            neighbour.kill()
    return [after - before for before, after in itertools.pairwise(taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for training, steps in ((champion, 5 * given.steps), (baking, given.steps), (reinforcement, given.steps)):
        alone, beside = [], []
        for _ in range(given.repeats):
            alone += seconds_a_step(training, steps, busy=False)
            beside += seconds_a_step(training, steps, busy=True)
        a, b = statistics.median(alone), statistics.median(beside)
        print(f"{training.__name__:14} {a:.3f} s alone, {b:.3f} s beside a busy program: {b / a:.2f} times", flush=True)


if __name__ == "__main__":
    main()
