"""Arms of the reinforcement experiment, on the committed run and a handful of problems."""

import pytest
import torch
from tiny import tiny_quiet_star

from qs_lib.data import pocket
from qs_lib.experiments import arms, baking, chain, reinforcement
from qs_lib.experiments.__main__ import EXPERIMENTS
from qs_lib.files import find_run, read_rows
from qs_lib.training.settings import QuietStarSettings
from qs_lib.workbook.stage import read_stage, stage_digest


@pytest.fixture
def few(monkeypatch):
    """The committed models, and eight problems of each split."""
    whole = reinforcement.loaded

    def load(run, start):
        model, tokenizer, data = whole(run, start)
        return model, tokenizer, {split: problems[:8] for split, problems in data.items()}

    monkeypatch.setattr(reinforcement, "loaded", load)
    monkeypatch.setattr(reinforcement, "seed_run", lambda run, seed, stages: run)
    reinforcement.baseline.cache_clear()
    yield reinforcement.rl_recipe() | {"steps": 2, "batch_size": 4, "evaluate_every": 1}
    reinforcement.baseline.cache_clear()


def test_every_arm_that_few_seeds_decide_is_there():
    assert set(reinforcement.DECIDED_BY) < set(reinforcement.ARMS) and "full" not in reinforcement.DECIDED_BY


def test_every_arm_changes_something_that_training_knows():
    recipe = reinforcement.rl_recipe()
    assert set(recipe) == set(QuietStarSettings.model_fields) - {"seed"}
    for name, settings in reinforcement.ARMS.items():
        assert all(k in ("start", "think") or (k in recipe and recipe[k] != v) for k, v in settings.items()), name
    starts = {s.get("start", "03_baking/baked") for s in reinforcement.ARMS.values()}
    assert all((find_run("") / start / "model.safetensors").is_file() for start in starts - {reinforcement.EIGHTH})


def test_an_arm_is_measured_against_the_model_it_started_from(few):
    row = reinforcement.train_once(find_run(""), few, 0)
    again, likely = reinforcement.baseline(find_run(""), "03_baking/baked", 28, 0)
    assert row["baseline"] == again.mixed.mean() and row["gain"] == pytest.approx(row["accuracy"] - row["baseline"])
    assert row["gain_low"] <= row["gain"] <= row["gain_high"] and len(row["validation"]) == 2
    assert row["probability_baseline"] == likely["with"].mean()
    beyond = row["probability"] - likely["with fitted"].mean()
    assert row["beyond_temperature"] == pytest.approx(beyond)
    half = reinforcement.train_once(find_run(""), few | {"start": "03_baking/epochs/1"}, 0)
    assert half["baseline"] == reinforcement.baseline(find_run(""), "03_baking/epochs/1", 28, 0)[0].mixed.mean()


def test_direct_training_makes_the_answers_likelier_and_needs_no_thought(few):
    model, tokenizer = tiny_quiet_star()
    problems = pocket.generate("train", 4, 0)
    ids, mask, positions = reinforcement.answer_batch(tokenizer, problems)

    def answer_nll():
        model.lm.eval()
        with torch.no_grad():
            logits = model.lm(ids, attention_mask=mask).logits.clone()
        logits[..., model.config.hidden_ids] = -torch.inf
        at = positions[:, 0]
        return -logits[torch.arange(4), at].log_softmax(-1).gather(1, ids[torch.arange(4), at + 1, None]).mean().item()

    before = answer_nll()
    found = reinforcement.train_direct(
        model.lm,
        tokenizer,
        problems,
        problems,
        QuietStarSettings(steps=40, batch_size=4, muon_lr=2e-2, adamw_lr=1e-2, evaluate_every=20),
    )
    assert answer_nll() < before / 2 and len(found) == 2
    row = reinforcement.train_once(find_run(""), few | {"think": False}, 0)
    assert row["without"] == row["accuracy"]


def test_the_committed_rows_are_those_of_the_arms_as_they_are(monkeypatch, tmp_path):
    """Every row of these files is found again by its settings: repeating the experiments trains nothing."""
    monkeypatch.setattr(reinforcement, "for_scoreboard", lambda folder: None)

    def train(*_):
        raise AssertionError("a row was not found")

    found = {"rl": (reinforcement, "seed_run"), "baking": (baking, "bake_once"), "chain": (chain, "seed_run")}
    for name, (module, trains) in found.items():
        source = find_run("") / "experiments" / f"{name}.csv"
        (tmp_path / source.name).write_bytes(source.read_bytes())
        monkeypatch.setattr(module, trains, train)
        EXPERIMENTS[name](find_run(""), tmp_path, [0, 1, 2])
        assert (tmp_path / source.name).read_bytes() == source.read_bytes()


def test_a_row_made_before_a_setting_existed_stands_for_its_default():
    row = {"arm": "a", "seed": 0, "settings": {"steps": 3}}
    assert arms.row_of([row], "a", 0, {"steps": 3, "new": 1}, {"steps": 9, "new": 1}) is row
    assert arms.row_of([row], "a", 0, {"steps": 3, "new": 2}, {"steps": 9, "new": 1}) is None
    assert arms.row_of([row], "a", 0, {"steps": 9, "new": 1}, {"steps": 9, "new": 1}) is None


def test_rows_are_kept(few, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcement, "for_scoreboard", lambda folder: None)
    monkeypatch.setattr(reinforcement, "ARMS", {"full": {}, "pg off": {"pg_weight": 0.0}, "n_true 1": {"n_true": 1}})
    monkeypatch.setattr(reinforcement, "DECIDED_BY", {"n_true 1": range(3)})
    monkeypatch.setattr(
        reinforcement,
        "train_once",
        lambda run, settings, seed, checkpoint: {"gain": 0.1 + settings["pg_weight"], "v": [0.123456]},
    )
    reinforcement.reinforcement(find_run(""), tmp_path, [0, 1, 2, 3])
    rows = read_rows(tmp_path / "rl.csv")
    assert sorted((r["arm"], r["seed"]) for r in rows) == sorted(
        [(a, s) for a in ("full", "pg off") for s in range(4)] + [("n_true 1", s) for s in range(3)]
    )
    assert rows[0]["v"] == [0.12346] and rows[0]["data"] == stage_digest(read_stage(find_run("") / "03_baking")[0])[:12]


def test_look_ahead_makes_its_run_once_and_only_where_it_is_missing(tmp_path, monkeypatch):
    made, trained = [], []
    monkeypatch.setattr(reinforcement, "for_scoreboard", lambda folder: None)
    monkeypatch.setattr(reinforcement, "stage_digest", lambda record: "0123456789abcdef")
    monkeypatch.setattr(chain, "made_with", lambda run, settings, seed: bool(made))
    monkeypatch.setattr(chain, "make_run", lambda *given: made.append(given))
    monkeypatch.setattr(
        reinforcement,
        "train_once",
        lambda run, settings, seed, checkpoint: trained.append((run.name, settings["n_true"])) or {"gain": 0},
    )
    for _ in range(2):
        reinforcement.look_ahead(tmp_path / "pocket", tmp_path / "experiments", [0, 1])
    assert made == [("pocket-digits-seed0", 0, ("01", "02", "03"), "pocket-digits")]
    assert [n for _, n in trained] == [4, 1] * 2 and trained[0][0] == "pocket-digits-seed0"
