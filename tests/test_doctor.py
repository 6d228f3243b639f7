"""The training doctor names planted diseases, each alone, and finds none in healthy runs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qs_lib.evaluation.episodes import Episode, Thought
from qs_lib.viewing import doctor, rules

POCKET = Path(__file__).resolve().parents[1] / "outputs" / "pocket"
STEPS = 200
SHARES = ("tied", "signal", "correct", "no_thought_weight", "validation_accuracy")


def course(seed: int = 0, steps: int = STEPS, validate: int = 40, **changed) -> list[dict]:
    """Rows of a healthy reinforcement with noise. ``changed``: a metric as a function of progress (0 to 1)."""
    rng = np.random.default_rng(seed)
    shape = {
        "reward": lambda t: -0.5 + 0.7 * t,
        "tied": lambda t: 0.2 + 0.2 * t,
        "signal": lambda t: 0.7 - 0.2 * t,
        "correct": lambda t: 0.5 + 0.25 * t,
        "entropy": lambda t: 0.5 - 0.25 * t,
        "length": lambda t: 18 + 3 * t,
        "no_thought_weight": lambda t: max(0.05, 1 - 4 * t),
        "kl": lambda t: 3 * t,
        "base_kl": lambda t: 0.03 * t,
        "loss": lambda t: 1.5 - 0.6 * t,
        "validation_accuracy": lambda t: 0.7 + 0.15 * t,
        "max_logit": lambda t: 12 + 5 * t,
        "gradient_model": lambda t: 2 + t,
        "gradient_head": lambda t: 0.3,
        "seconds": lambda t: 3,
    } | changed
    rows = []
    for step in range(1, steps + 1):
        t = step / steps
        row = {name: float(f(t) * (1 + 0.05 * rng.standard_normal())) for name, f in shape.items()}
        for name in SHARES:
            row[name] = float(np.clip(shape[name](t) + 0.008 * rng.standard_normal(), 0, 1))
        if step % validate:
            del row["validation_accuracy"], row["max_logit"]
        rows.append(row | {"step": step})
    return rows


def baked(**changed) -> list[dict]:
    """Rows of a healthy baking of two epochs."""
    rows = [{"step": 20 * i, "epoch": 1 + i // 15, "loss": 16 * 0.8**i, "kl": 0.8**i} for i in range(1, 30)]
    for epoch, accuracy in enumerate(changed.pop("accuracies", (0.8, 0.89)), 1):
        dose = {"epoch": epoch, "kl": 0.1 / epoch, "max_logit": 11.0, "accuracy": accuracy, "thinking_use": 0.98}
        rows.insert(15 * epoch, {"step": 300 * epoch} | dose | changed)
    return rows


def ill(rows, *given, **named) -> dict[str, str]:
    """What the doctor finds wrong, as name -> verdict."""
    return {f.name: f.verdict for f in doctor.examine(rows, *given, **named) if f.verdict in ("look", "sick")}


def episode(answers, utility: float = 1.0, answer: str = "7") -> Episode:
    thoughts = [Thought(tokens=["a"], logprobs=[0.0], utility=utility, answer=a) for a in answers]
    return Episode(problem=0, question="q", answer=answer, position=0, tokens=["q"], thoughts=thoughts)


DISEASES = {
    "dead groups": ("sick", {"tied": lambda t: 0.94, "signal": lambda t: 0.03}),
    "difficulty": ("sick", {"correct": lambda t: 0.0, "validation_accuracy": lambda t: 0.02}),
    "reward hacking": (
        "sick",
        {"reward": lambda t: 4 * t, "length": lambda t: 12 + 30 * t, "validation_accuracy": lambda t: 0.8 - 0.3 * t},
    ),
    "length": ("sick", {"length": lambda t: 24 / (1 + 4 * t), "kl": lambda t: t, "validation_accuracy": lambda t: 0.7}),
    "entropy": ("sick", {"entropy": lambda t: 0.5 * math.exp(-5 * t)}),
    "gate": ("sick", {"no_thought_weight": lambda t: 1 - 0.01 * t}),
    "thoughts ignored": ("sick", {"reward": lambda t: 0.002, "signal": lambda t: 0.0, "tied": lambda t: 0.97}),
    "kl": ("sick", {"kl": lambda t: 60 * t}),
    "rate": (
        "sick",
        {"loss": lambda t: 1.5 if t < 0.7 else 1.5 * 400 ** (t - 0.7), "validation_accuracy": lambda t: 0.8 - 0.5 * t}
        | {"reward": lambda t: -0.5 - t, "kl": lambda t: 90 * t},
    ),
    "gradients": ("sick", {"gradient_model": lambda t: 2 if t < 0.8 else 900}),
    "leaking validation": ("look", {"validation_accuracy": lambda t: 0.99, "correct": lambda t: 0.4 + 0.1 * t}),
    "attention logits": ("sick", {"max_logit": lambda t: 20 + 300 * t}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DISEASES)
def test_each_planted_disease_is_named_and_no_other(name, seed):
    verdict, changed = DISEASES[name]
    assert ill(course(seed, **changed)) == {name: verdict}


def test_every_rule_of_reinforcement_has_its_disease():
    assert {rule.__name__.replace("_", " ") for rule in rules.REINFORCEMENT_RULES} == {*DISEASES, "pace"}


def test_the_pace_is_told_and_never_accused():
    rows = [{"step": n, "seconds": 30.0, "loss": 1.0} for n in range(1, 13)]
    rows[3]["validation_accuracy"], rows[11]["validation_accuracy"] = 0.5, 0.7
    pace = rules.pace(rules.Course(rows))
    assert pace == ("healthy", "+20.0 points of held-out accuracy in 4.0 minutes, +5 a minute")
    rows[5].pop("seconds")
    assert rules.pace(rules.Course(rows))[0] == "unknown"


def test_a_part_without_gradient_is_named():
    assert ill(course(gradient_head=lambda t: 0.0)) == {"gradients": "sick"}
    (found,) = [f for f in doctor.examine(course(gradient_head=lambda t: 0.0)) if f.name == "gradients"]
    assert "0 for the head" in found.sentence and found.sentence.endswith("frozen, or not in the loss")


def test_every_rule_is_in_the_table_of_the_documentation():
    table = (POCKET.parents[1] / "docs" / "METHODS.md").read_text("utf-8").partition("| rule | look | sick | why |")[2]
    named = {line.split("|")[1].partition("(")[0].strip() for line in table.splitlines()[2:] if line.startswith("|")}
    known = {*rules.REINFORCEMENT_RULES, *rules.BAKING_RULES, *rules.PRETRAINING_RULES}
    assert named == {rule.__name__.replace("_", " ") for rule in known}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("dead groups", {"tied": lambda t: 0.82}),
        ("difficulty", {"correct": lambda t: 0.99}),
        ("difficulty", {"correct": lambda t: 0.03, "validation_accuracy": lambda t: 0.1}),
        ("length", {"length": lambda t: 12 + 12 * t, "validation_accuracy": lambda t: 0.7}),
        ("entropy", {"entropy": lambda t: 0.5 * math.exp(-2.1 * t)}),
        ("gate", {"no_thought_weight": lambda t: 0.93}),
        ("kl", {"base_kl": lambda t: 0.3 * t}),
        ("gradients", {"gradient_head": lambda t: 0.3 if t < 0.8 else 8}),
        ("rate", {"validation_accuracy": lambda t: 0.85 - 0.17 * t, "reward": lambda t: -0.5 - t}),
    ],
)
def test_what_may_become_a_disease_is_to_be_looked_at(name, changed):
    assert ill(course(**changed)) == {name: "look"}


HEALTHY = {
    "plain": {},
    "right or wrong": {"reward": lambda t: 0.5 + 0.25 * t},
    "longer and better": {"length": lambda t: 10 + 20 * t, "validation_accuracy": lambda t: 0.5 + 0.3 * t},
    "flat": {"reward": lambda t: -0.2, "validation_accuracy": lambda t: 0.7, "length": lambda t: 20},
    "gate that opens late": {"no_thought_weight": lambda t: 1 if t < 0.5 else max(0.1, 2 - 2 * t)},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_called_healthy(name, seed):
    assert ill(course(seed, **HEALTHY[name])) == {}


@pytest.mark.parametrize("stage", ["01_token_setup", "03_baking", "05_rl"])
def test_the_pocket_run_is_healthy_at_its_end_and_reinforcement_after_its_warm_up(stage):
    rows, torn = doctor.read_metrics(POCKET / stage / "metrics.jsonl")
    assert torn == 0 and ill(rows) == {}
    if stage == "05_rl":
        assert [n for n in range(20, len(rows)) if ill(rows[:n])] == []


def test_sentences_give_number_cause_and_next_step():
    (found,) = [f for f in doctor.examine(course(tied=lambda t: 0.82)) if f.verdict == "look"]
    assert "% of the groups have no spread in reward: raise temperature or choose harder problems" in found.sentence
    assert "75 %" in rules.dead_groups.__doc__ and isinstance(found, tuple)
    hacked = [f.sentence for f in doctor.examine(course(**DISEASES["reward hacking"][1])) if f.verdict == "sick"]
    assert "thoughts grew from" in hacked[0] and "lower thought_length" in hacked[0]


def test_episodes_tell_difficulty_and_ignored_thoughts():
    rows = course()
    assert ill(rows, [episode("7777")] * 12) == {"difficulty": "look"}
    assert ill(rows, [episode("1234")] * 12) == {"difficulty": "look"}
    bare = [{k: v for k, v in row.items() if k != "correct"} for row in rows]
    assert ill(bare, [episode("1234")] * 12) == {"difficulty": "sick"}
    assert ill(rows, [episode("7712")] * 12) == {}
    assert ill(rows, [episode("7712", utility=0.001)] * 12) == {"thoughts ignored": "sick"}
    assert ill(rows, [episode("1234")] * 3) == {}, "too few groups say nothing"


def test_copied_questions_are_a_leak(tmp_path):
    for split, questions in {"train": ["a", "b"], "validation": ["b", "c", "d", "e"]}.items():
        pd.DataFrame({"question": questions}).to_parquet(tmp_path / f"{split}.parquet")
    assert doctor.copied_questions(tmp_path) == 0.25
    assert ill(course(), copied=0.25) == {"leaking validation": "sick"}
    assert doctor.copied_questions(tmp_path / "none") is None
    (tmp_path / "train.parquet").write_bytes(b"torn")
    assert doctor.copied_questions(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("thinking", {"thinking_use": 0.3}),
        ("thinking", {"accuracies": (0.9, 0.8)}),
        ("attention logits", {"max_logit": 240.0}),
    ],
)
def test_diseases_of_baking(name, changed):
    assert ill(baked()) == {}
    assert list(ill(baked(**changed))) == [name]


def test_a_loss_that_stays_or_explodes_is_seen_without_reinforcement_too():
    assert ill([{"step": i, "loss": 3.0, "lr": 0.1} for i in range(60)]) == {"learning": "sick"}
    assert ill([{"step": i, "loss": 3.0 if i < 55 else 90.0, "lr": 0.1} for i in range(60)]) == {"rate": "sick"}


@pytest.mark.parametrize("rows", [[], [{}], course()[:1], course()[:9], ["no dict", None, 3]])
def test_too_few_rows_are_one_sentence(rows):
    (found,) = doctor.examine(rows)
    assert found.verdict == "unknown" and "say nothing yet" in found.sentence


def test_malformed_rows_are_passed_over():
    strange = [None, 3, "x", {"reward": "high", "step": None}, {"correct": True, "kl": [1]}, {"entropy": 10**400}]
    strange += [{"length": math.nan, "validation_accuracy": None}, {"reward": math.inf}]
    assert ill([*course(), *strange]) == {}
    assert ill([*course(), {"loss": math.nan, "reward": 0.1}]) == {"rate": "sick"}
    for name in course()[-1]:
        assert ill([{k: v for k, v in row.items() if k != name} for row in course()]) == {}, name
        doctor.examine([row | {name: 0.0} for row in course()])
        doctor.examine([row | {name: "?"} for row in course()])


def test_what_cannot_be_told_is_said():
    rows = [{k: v for k, v in row.items() if k != "validation_accuracy"} for row in course()]
    unknown = {f.name: f.sentence for f in doctor.examine(rows) if f.verdict == "unknown"}
    assert set(unknown) == {"reward hacking", "length", "leaking validation", "pace"}
    assert all("validation_accuracy" in sentence for sentence in unknown.values())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    for stage in ("03_baking", "05_rl"):
        (tmp_path / "r" / stage).mkdir(parents=True)
    assert doctor.main(["r"]) == 1 and "has no training" in capsys.readouterr().err
    text = "".join(json.dumps(row) + "\n" for row in course(**DISEASES["gate"][1]))
    (tmp_path / "r" / "05_rl" / "metrics.jsonl").write_text(text + '[]\n{"reward": 0.')
    (tmp_path / "r" / "05_rl" / "episodes.jsonl").write_text("{}\n")
    assert doctor.main(["r"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "03_baking: no metrics.jsonl yet, make it with `make run RUN=r NB=03_baking`"
    assert lines[1].startswith("05_rl: 200 rows, 2 lines cannot be read, ") and "is not an episode" in lines[1]
    assert [line.split()[0] for line in lines if "SICK: " in line] == ["gate"]
    (tmp_path / "r" / "05_rl" / "metrics.jsonl").write_bytes(b"")
    assert doctor.main(["r"]) == 0 and "0 rows say nothing yet" in capsys.readouterr().out
    assert doctor.main(["nowhere"]) == 1 and capsys.readouterr().err.count("\n") == 1


def test_the_command_on_the_pocket_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    for stage in ("02_dataset_generation", "03_baking", "05_rl"):
        ignored = shutil.ignore_patterns("*.safetensors", "baked", "epochs", "quietstar")
        shutil.copytree(POCKET / stage, tmp_path / "p" / stage, ignore=ignored)
    assert doctor.main(["p"]) == 0
    told = capsys.readouterr().out
    assert "LOOK" not in told and "SICK" not in told and "no question is copied" in told
