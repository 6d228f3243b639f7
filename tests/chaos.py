"""Kill trainings with -9 at random instants and resume them until they end: are they the trainings they would have been?

    python tests/chaos.py [KILLS=300] [FOLDER]        (make chaos)

Champion, baking and RL of a tiny model, in turn, each in a process of its own that is forked from this one, with a
checkpoint every few steps. After its kills every training must end with weights and metrics byte-identical to those of
the undisturbed one, and no kill may cost more than one checkpoint interval. Prints one line of JSON; exit code 1 if not.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; our own bar is shown all the same

import torch
from tiny import problems, tiny_champion, tiny_lm, tiny_quiet_star
from tqdm import tqdm

from qs_lib.data.strategies import reasoning_dataset
from qs_lib.training import checkpoint
from qs_lib.training.baking import bake
from qs_lib.training.checkpoint import Checkpoint
from qs_lib.training.pretrain import corpus, pretrain
from qs_lib.training.reinforce import train_quiet_star

INTERVAL = 3
EXAMPLES = list(reasoning_dataset(problems(size=400), (), 16, 8)["train"])


class EveryFewSteps(Checkpoint):
    """A checkpoint every INTERVAL steps instead of every so many seconds; writes down each step that is begun anew."""

    def after(self, step, parts, last=False):
        with open(self.folder.with_suffix(".steps"), "a") as file:
            file.write(f"{step}\n")
        self._saved = -1e9 if step % INTERVAL == 0 else time.monotonic()
        super().after(step, parts, last)


def champion(saving):
    model, tokenizer = tiny_champion()
    pretrain(model, tokenizer, corpus(problems(size=400)), steps=40, batch_size=8, checkpoint=saving)
    return model


def baking(saving):
    model, tokenizer = tiny_lm()
    pretrain(model, tokenizer, corpus(problems(size=400)), steps=25, batch_size=16)
    teach(model, tokenizer, saving)
    return model


def teach(model, tokenizer, saving):
    from qs_lib.training import baking as module

    # A model so small writes no whole thought: its held-out and sampled replies are worked examples instead.
    module.sample_trajectories = lambda teacher, tokenizer, problems, **_: [
        module.thought_item(
            tokenizer,
            f"{e['prompt']} {e['question']}",
            e["question"],
            tokenizer.encode(" " + e["reply"], add_special_tokens=False) + [tokenizer.eos_token_id],
        )
        for e in EXAMPLES[:6]
    ]
    bake(
        model,
        tokenizer,
        EXAMPLES,
        problems(size=64),
        problems("validation", 6),
        epochs=2,
        batch_size=12,
        checkpoint=saving,
    )


def rl(saving):
    model, tokenizer = tiny_quiet_star()
    train_quiet_star(
        model,
        tokenizer,
        problems(size=64),
        problems("validation", 6),
        steps=24,
        batch_size=4,
        num_thoughts=3,
        thought_length=8,
        n_true=3,
        evaluate_every=5,
        checkpoint=saving,
    )
    return model


TRAININGS = (champion, baking, rl)


def run(training, folder: Path) -> None:
    """One attempt, in a process that may be killed: metrics.jsonl is written anew, weights.sha256 at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    checkpoint.SHARE = float("inf")
    with open(folder / "metrics.jsonl", "w") as metrics:

        def log(**line):
            line.pop("seconds", None)  # the one number that a second run need not repeat
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()

        model = training(EveryFewSteps(folder / "checkpoint", {"training": training.__name__}, log))
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in model.state_dict().values())).hexdigest()
    (folder / "weights.sha256").write_text(digest)


def attempt(training, folder, patience=None) -> bool:
    """Run, and kill after ``patience`` seconds; whether it was killed before it had ended."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(training, folder))
    process.start()
    process.join(patience)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    elif process.exitcode != 0:
        raise SystemExit(f"{training.__name__} failed by itself, exit code {process.exitcode}")
    return killed


def ended(folder) -> tuple[bytes, bytes]:
    return (folder / "weights.sha256").read_bytes(), (folder / "metrics.jsonl").read_bytes()


def redone(folder) -> int:
    """Most steps that a single kill cost, from the steps written down: where the numbers fall back, by how many."""
    steps = [int(line) for line in (folder / "checkpoint.steps").read_text().split()]
    return max((before - after + 1 for before, after in itertools.pairwise(steps) if after <= before), default=0)


def main(kills: int, folder: Path) -> int:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared between processes and dies with the one that holds it
    rng, right, seconds = random.Random(0), {}, {}
    for training in TRAININGS:
        where = folder / f"{training.__name__}-whole"
        where.mkdir(parents=True)
        started = time.monotonic()
        attempt(training, where)
        right[training], seconds[training] = ended(where), time.monotonic() - started
    report = {"kills": 0, "trainings": 0, "different": 0, "most_steps_redone": 0, "interval": INTERVAL}
    with tqdm(total=kills, desc="kills", disable=False) as bar:
        while report["kills"] < kills:
            training = TRAININGS[report["trainings"] % len(TRAININGS)]
            where = folder / f"{training.__name__}-{report['trainings']}"
            where.mkdir()
            for _ in range(min(7, kills - report["kills"])):  # then it may end
                if not attempt(training, where, rng.uniform(0.05, 0.6) * seconds[training]):
                    break
                report["kills"] += 1
                bar.update()
            else:
                attempt(training, where)
            report["trainings"] += 1
            report["different"] += ended(where) != right[training]
            report["most_steps_redone"] = max(report["most_steps_redone"], redone(where))
            shutil.rmtree(where)
    print(json.dumps(report))
    return int(report["different"] > 0 or report["most_steps_redone"] > INTERVAL)


if __name__ == "__main__":
    given = sys.argv[1:]
    place = Path(given[1]) if len(given) > 1 else Path(tempfile.mkdtemp())
    raise SystemExit(main(int(given[0]) if given else 300, place))
