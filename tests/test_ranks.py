"""Two processes that train together (gloo), against one process on the same global batches."""

import json
import multiprocessing
import os
import signal
import traceback

import pytest
import torch
import torch.distributed as dist
from test_baking import plain_trajectories
from tiny import problems, tiny_champion, tiny_lm, tiny_quiet_star

from qs_lib.errors import TrainingError, WorkbookError
from qs_lib.experiments import two_processes
from qs_lib.training import baking, distributed, reinforce
from qs_lib.training import pretrain as pretraining
from qs_lib.training.checkpoint import Checkpoint

FORK = multiprocessing.get_context("fork")  # a fresh Python would import torch again
PATIENCE = 600  # seconds until two processes that wait for each other count as stuck; a busy machine needs minutes


def _child(work, number, store, answer):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    try:
        answer.send((True, work()))
    except BaseException as error:  # noqa: BLE001 (told by the parent)
        traceback.print_exc()
        answer.send((False, f"{type(error).__name__}: {error}"))
    os._exit(0)  # no teardown: a process that raised would wait for the other


def together(work, tmp_path, fine=True):
    """What ``work()`` returns, or the error it raises, in each of two processes."""
    store, pipes = tmp_path / f"store-{os.urandom(4).hex()}", [FORK.Pipe(duplex=False) for _ in range(2)]
    for number, (_, end) in enumerate(pipes):
        FORK.Process(target=_child, args=(work, number, store, end), daemon=True).start()
    answers = [pipe.recv() if pipe.poll(PATIENCE) else (False, "no answer") for pipe, _ in pipes]
    assert all(well == fine for well, _ in answers), answers
    return [found for _, found in answers]


def state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def largest_difference(one, two):
    return max(abs(one[name] - two[name]).max() for name in one)


def bake(log=lambda **_: None, **settings):
    model, tokenizer = tiny_lm()
    before, epochs = baking.sample_trajectories, []
    baking.sample_trajectories = plain_trajectories
    try:
        settings = {"epochs": 2, "trajectories": 18, "batch_size": 8, "max_new_tokens": 4} | settings
        baking.bake(
            model,
            tokenizer,
            [],
            problems(size=40),
            problems("validation")[:6],
            checkpoint=Checkpoint(log=log),
            on_epoch=lambda epoch, _: epochs.append(epoch),
            **settings,
        )
    finally:
        baking.sample_trajectories = before
    return state(model), epochs


def pretrain(log=lambda **_: None, **settings):
    model, tokenizer = tiny_champion()
    loss = pretraining.pretrain(
        model,
        tokenizer,
        pretraining.corpus(problems(size=60)),
        steps=5,
        batch_size=8,
        checkpoint=Checkpoint(log=log),
        **settings,
    )
    return state(model), loss


def reinforced(log=lambda **_: None, checkpoint=None, **settings):
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.5)
    settings = {
        "steps": 3,
        "batch_size": 5,
        "num_thoughts": 3,
        "thought_length": 8,
        "n_true": 3,
        "evaluate_every": 3,
    } | settings
    result = reinforce.train_quiet_star(
        model,
        tokenizer,
        problems(size=24),
        problems("validation")[:4],
        checkpoint=checkpoint or Checkpoint(log=log),
        **settings,
    )
    return state(model), result.history


def logged(work, **settings):
    lines = []

    def log(seconds=0, **metrics):  # seconds need not be those of another run
        lines.append(metrics)

    return lambda: (*work(log=log, **settings), lines)


def test_shares_and_weighed_means_by_hand(tmp_path):
    def work():
        mine = distributed.share([1.0, 2.0, 4.0, 8.0, 16.0])
        weight = torch.nn.Parameter(torch.tensor(1.0))
        distributed.weigh((weight * torch.tensor(mine)).mean(), len(mine)).backward()
        unused, one_sided = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        if distributed.first():
            one_sided.grad = torch.tensor([2.0, 4.0])
        distributed.average([weight, unused, one_sided])
        return (
            mine,
            distributed.share([7]),
            weight.grad.item(),
            unused.grad,
            one_sided.grad.tolist(),
            distributed.either(not distributed.first()),
        )

    first, second = together(work, tmp_path)
    assert first[0] == [1.0, 4.0, 16.0] and second[0] == [2.0, 8.0] and first[1] == second[1] == [7]
    assert first[2:] == second[2:] == (pytest.approx(31 / 5), None, [1.0, 2.0], True)


def test_one_process_shares_nothing():
    loss, batch = torch.tensor(3.0), [1, 2]
    assert (
        distributed.share(batch) is batch
        and distributed.weigh(loss, 5) is loss
        and distributed.first()
        and distributed.start(1) == 1
    )
    with pytest.raises(WorkbookError, match="1 of 2 processes were started: run it with `torchrun --nproc_per_node 2`"):
        distributed.start(expected=2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


@pytest.mark.parametrize(
    ("settings", "bound"), [({"optimizer": sgd}, 1e-6), ({}, 2e-4), ({"qk_clip_threshold": 0.05}, 2e-4)]
)
def test_baking_in_two_processes_is_baking_in_one(tmp_path, settings, bound):
    (alone, _, lines), (one, epochs, own), (two, other_epochs, other) = (
        logged(bake, **settings)(),
        *together(logged(bake, **settings), tmp_path),
    )
    assert largest_difference(one, two) == 0 and largest_difference(alone, one) < bound
    assert epochs == [1, 2] and other_epochs == [] and other == [] and len(own) == len(lines)
    for a, b in zip(lines, own, strict=True):
        assert a.keys() == b.keys() and a["kl"] == pytest.approx(b["kl"], rel=0.25)
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-3)


def test_pretraining_in_two_processes_is_pretraining_in_one(tmp_path):
    (alone, loss, _), (one, own, lines), (two, _, other) = logged(pretrain)(), *together(logged(pretrain), tmp_path)
    assert largest_difference(one, two) == 0 and largest_difference(alone, one) < 1e-3
    assert own == pytest.approx(loss, rel=1e-4) and lines and not other


@pytest.mark.parametrize(
    "settings",
    [{}, {"think_at": "difficult", "num_positions": 3}, {"think_at": "every", "over": 1}],
)
def test_reinforcement_in_two_processes_is_reinforcement_in_one(tmp_path, settings):
    (alone, history, _), (one, own, lines), (two, other, none) = (
        logged(reinforced, **settings)(),
        *together(logged(reinforced, **settings), tmp_path),
    )
    assert largest_difference(one, two) == 0 and largest_difference(alone, one) < 1e-3
    assert own == other and lines == own and none == []
    for a, b in zip(history, own, strict=True):
        assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], abs=1e-3)
        assert a["diversity"] == b["diversity"], "other thoughts were drawn"


def test_the_training_to_try_says_how_many_there_were_and_ends_where_one_ends(tmp_path):
    two_processes.train(tmp_path / "alone", steps=3)
    together(lambda: two_processes.train(tmp_path / "two", steps=3), tmp_path)
    one, two = (json.loads((tmp_path / "two" / f"rank-{number}.json").read_text()) for number in (0, 1))
    assert one["processes"] == two["processes"] == 2 and one["weights_sha256"] == two["weights_sha256"]
    assert two_processes.largest_weight_difference(tmp_path / "alone", tmp_path / "two") < two_processes.BOUND
    assert json.loads((tmp_path / "alone" / "rank-0.json").read_text())["processes"] == 1


def test_a_torchrun_that_fails_is_one_sentence(tmp_path):
    with pytest.raises(
        WorkbookError, match=r"torchrun ended with \d+ .*see all of it with `torchrun --standalone --nproc_per_node 0"
    ):
        two_processes.torchrun(0, tmp_path)


def test_a_signal_to_one_process_stops_both_and_both_go_on(tmp_path, monkeypatch):
    real, folder = reinforce.quiet_star_loss, tmp_path / "checkpoints"

    def stopped(*given, **more):
        stopped.calls += 1
        if stopped.calls == 2 and not distributed.first():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **more)

    stopped.calls = 0
    work = lambda: reinforced(checkpoint=Checkpoint(folder, {"a": 1}, seconds=1e9))
    monkeypatch.setattr(reinforce, "quiet_star_loss", stopped)
    ended = together(work, tmp_path, fine=False)
    assert ended == ["KeyboardInterrupt: ", "SystemExit: 143"]
    assert [path.name for path in folder.iterdir()] == ["step-00000002.safetensors"]
    monkeypatch.setattr(reinforce, "quiet_star_loss", real)
    again, whole = together(work, tmp_path), together(reinforced, tmp_path)
    assert all(largest_difference(found[0], whole[0][0]) == 0 for found in again)


def test_processes_that_differ_are_told(tmp_path):
    def other_weights():
        model, tokenizer = tiny_champion(seed=distributed.rank())
        pretraining.pretrain(model, tokenizer, pretraining.corpus(problems(size=60)), steps=1)

    assert all("different weights before training" in text for text in together(other_weights, tmp_path, fine=False))

    def bad_loss():
        model, tokenizer = tiny_champion()
        encode = pretraining.F.cross_entropy
        pretraining.F.cross_entropy = lambda *a, **k: encode(*a, **k) * (1 if distributed.first() else float("nan"))
        pretraining.pretrain(model, tokenizer, pretraining.corpus(problems(size=60)), steps=1)

    assert all(
        text.startswith(TrainingError.__name__) and "loss is nan" in text
        for text in together(bad_loss, tmp_path, fine=False)
    )


def test_a_folder_that_only_one_process_sees_is_told(tmp_path):
    def work():
        folder = tmp_path / "own" if distributed.first() else tmp_path / "elsewhere"
        model = torch.nn.Linear(1, 1)
        if distributed.first():
            Checkpoint(folder, {}).save(3, {"model": model})
        Checkpoint(folder, {}).resume({"model": model})

    assert all("do not see the same checkpoints" in text for text in together(work, tmp_path, fine=False))
