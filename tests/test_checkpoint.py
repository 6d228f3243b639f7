"""Checkpoints: every piece of state comes back, damage is noticed, and a killed training ends as if it had not been."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qs_lib.training import checkpoint as module
from qs_lib.training.checkpoint import Checkpoint, pack, read_state, unpack
from qs_lib.training.optim import MuonGrokfast

HERE = Path(__file__).parent


def test_a_tree_comes_back_as_it_was(tmp_path):
    shared = torch.randn(3, 4)
    tree = {
        "tied": [shared, shared],
        3: (1, 2.5, None, True, "ä"),
        "empty": {},
        "half": torch.randn(5).bfloat16(),
        "keys": np.arange(3, dtype=np.uint32),
        "big": 2**127 + 1,
        "bytes": torch.get_rng_state(),
        "zero": torch.zeros(0),
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"step": 7}, tree))
    head, tensors = read_state(path)
    back = unpack(head["parts"], tensors)
    assert head["step"] == 7 and list(back) == list(tree) and back[3] == tree[3] and back["big"] == tree["big"]
    assert all(torch.equal(t, shared) for t in back["tied"]) and torch.equal(back["half"], tree["half"])
    assert back["keys"].dtype == np.uint32 and back["keys"].tolist() == [0, 1, 2] and back["zero"].numel() == 0
    assert len([t for t in tensors.values() if t.shape == (3, 4)]) == 1, "tied weights are stored once"
    with pytest.raises(TypeError, match="a set cannot be saved"):
        pack({}, {"a": {1}})


def test_any_flipped_bit_and_any_missing_byte_is_noticed(tmp_path):
    data = pack({"step": 1}, {"w": torch.randn(40), "b": [1, 2]})
    path, rng, wrong = tmp_path / "a.safetensors", random.Random(0), 0
    for _ in range(400):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        try:
            read_state(path)
        except (ValueError, OSError, module.SafetensorError):
            wrong += 1
    assert wrong >= 398, "padding of the header carries no state, nothing else may change unseen"


@pytest.fixture(autouse=True)
def save_every_step(monkeypatch):
    monkeypatch.setattr(module, "SHARE", float("inf"))


def parts(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 3)
    optimizer = MuonGrokfast(model, grokfast_lambda=0.2)
    return {
        "model": model,
        "optimizer": optimizer,
        "rng": random.Random(seed),
        "draw": torch.Generator().manual_seed(seed),
        "queue": [],
        "best": {"sum": 0.0},
    }


def train(folder, steps, seed=0, seconds=0.0, **changes):
    """A toy training that uses every kind of state; returns what it logged and its last weights."""
    state, lines = parts(seed) | changes, []
    with Checkpoint(folder, {"steps": steps}, lambda **m: lines.append(m), seconds) as saving:
        for step in range(saving.resume(state), steps):
            state["queue"][:] = state["queue"] or [state["rng"].random() for _ in range(3)]
            noise = torch.randn(2, 3, generator=state["draw"]) + torch.randn(2, 3) + random.random() + np.random.rand()
            loss = (state["model"](noise) ** 2).mean() * state["queue"].pop()
            loss.backward()
            state["optimizer"].step()
            state["optimizer"].zero_grad()
            state["best"]["sum"] += loss.item()
            saving.log(step=step, loss=loss.item(), sum=state["best"]["sum"])
            saving.after(step + 1, state, last=step + 1 == steps)
    return lines, state["model"].weight.detach().clone()


class Killed(Exception):
    pass


def stopped_at(folder, monkeypatch, step, steps=12):
    """The toy training up to a step, then killed; afterwards all global generators are elsewhere."""
    whole = Checkpoint.after

    def after(self, done, state, last=False):
        whole(self, done, state, last)
        if done == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "after", after)
        seed_all(0)
        train(folder, steps)
    seed_all(99)


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def whole_run(steps=12):
    seed_all(0)
    return train(None, steps)


@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_stopped_training_goes_on_to_the_bit(tmp_path, monkeypatch, capsys, step):
    stopped_at(tmp_path / "c", monkeypatch, step)
    lines, weights = train(tmp_path / "c", 12, seed=5)
    assert f"resumed after step {step}" in capsys.readouterr().err
    wanted, right = whole_run()
    assert lines == wanted and torch.equal(weights, right)
    assert [p.name for p in sorted((tmp_path / "c").iterdir())] == [
        "step-00000011.safetensors",
        "step-00000012.safetensors",
    ]
    assert train(tmp_path / "c", 12, seed=5)[0] == wanted, "finished: only the end is read"


@pytest.mark.parametrize("left_out", ["model", "optimizer", "rng", "draw", "queue", "best", "torch", "python", "numpy"])
def test_every_piece_of_state_is_needed(tmp_path, monkeypatch, left_out):
    """A planted fault: one piece is not restored, and the end differs."""
    stopped_at(tmp_path / "c", monkeypatch, 5)
    wanted, right = whole_run()
    if left_out in ("torch", "python", "numpy"):
        owner, name = {
            "torch": (torch, "set_rng_state"),
            "python": (random, "setstate"),
            "numpy": (np.random, "set_state"),
        }[left_out]
        monkeypatch.setattr(owner, name, lambda state: None)
    else:
        given, whole = parts(5), module.restore
        monkeypatch.setattr(
            module, "restore", lambda part, saved: None if part is given[left_out] else whole(part, saved)
        )
        lines, weights = train(tmp_path / "c", 12, **given)
        assert lines != wanted or not torch.equal(weights, right)
        return
    seed_all(99)
    lines, weights = train(tmp_path / "c", 12, seed=5)
    assert lines != wanted or not torch.equal(weights, right)


def test_damage_falls_back_and_another_training_starts_anew(tmp_path, monkeypatch, capsys):
    stopped_at(tmp_path / "c", monkeypatch, 7)
    newest = tmp_path / "c" / "step-00000007.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    lines, weights = train(tmp_path / "c", 12, seed=5)
    assert "resumed after step 6" in capsys.readouterr().err
    wanted, right = whole_run()
    assert lines == wanted and torch.equal(weights, right)
    (tmp_path / "c" / "epochs").mkdir()
    assert len(train(tmp_path / "c", 13)[0]) == 13
    said = capsys.readouterr().err
    assert "resumed" not in said and "starting anew" in said and not (tmp_path / "c" / "epochs").exists()


def test_other_thread_counts_and_identities_are_other_trainings(tmp_path):
    one = Checkpoint(tmp_path, {"a": 1})
    one.save(3, parts(0))
    assert Checkpoint(tmp_path, {"a": 1}).resume(parts(1)) == 3
    assert Checkpoint(tmp_path, {"a": 2}).resume(parts(1)) == 0 and not tmp_path.exists()
    threads = torch.get_num_threads()
    one.save(3, parts(0))
    try:
        torch.set_num_threads(threads + 1)
        assert Checkpoint(tmp_path, {"a": 1}).resume(parts(1)) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_finishes_the_step_saves_and_leaves(tmp_path, number, raised):
    state, before = parts(0), signal.getsignal(number)
    with pytest.raises(raised), Checkpoint(tmp_path, seconds=1e9) as saving:
        for step in range(saving.resume(state), 5):
            if step == 2:
                os.kill(os.getpid(), number)
                state["best"]["sum"] = "the step is finished"
            saving.after(step + 1, state)
    assert signal.getsignal(number) is before
    again = parts(1)
    assert Checkpoint(tmp_path).resume(again) == 3 and again["best"]["sum"] == "the step is finished"


def test_a_second_signal_leaves_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("unreachable")


def test_slow_saves_are_made_less_often(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARE", 0.01)
    saving = Checkpoint(tmp_path, seconds=0.0)
    saving._cost = 100.0  # a save that takes long: the next one is due after a hundred times that
    saving.after(1, parts(0))
    assert not list(tmp_path.iterdir())


def test_trainings_survive_random_kills(tmp_path):
    """Champion, baking and RL, small: 20 kills in all, weights and metrics byte-identical to the undisturbed runs'."""
    done = subprocess.run(
        [sys.executable, HERE / "chaos.py", "20", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 20 and report["different"] == 0 and report["most_steps_redone"] <= report["interval"]
