"""The arms of a pretrained model, on a random one: what they do, not what they reach."""

import json

import numpy as np
import pytest
import torch
from test_baking import plain_trajectories
from tiny import problems, tiny_lm, tiny_quiet_star

from qs_lib.data.strategies import asked, prompts_with
from qs_lib.data.tokens import thinking_ids
from qs_lib.errors import StageError, WorkbookError
from qs_lib.experiments import __main__ as command_line
from qs_lib.experiments import real_findings
from qs_lib.experiments import real_model as arms
from qs_lib.files import read_rows, write_rows
from qs_lib.model import QuietStarForCausalLM
from qs_lib.training import baking, reinforce
from qs_lib.training.settings import BakingSettings, QuietStarSettings

SMALL = {
    "01_token_setup": {"chat_template": None},
    "02_dataset_generation": {"data": "", "source": "pocket", "train_problems": 120, "validation_problems": 6}
    | {"test_problems": 8, "cot_examples": 4, "strategy_examples": 1},
    "03_baking": {"epochs": 1, "examples": 6, "trajectories": 6, "batch_size": 6, "eval_problems": 4}
    | {"lora_rank": 2, "prompt_examples": 1, "max_new_tokens": 12},
    "05_rl": {"steps": 2, "batch_size": 2, "num_thoughts": 2, "evaluate_every": 1, "thought_length": 8}
    | {"eval_problems": 4, "pass_low": 0.0, "pass_high": 0.99, "lora_rank": 2, "n_true": 3},
    "06_anti_theater": {"problems": 8},
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    model, tokenizer = tiny_lm()
    model.save_pretrained(tmp_path / "champion")
    tokenizer.save_pretrained(tmp_path / "champion")
    recipe = arms.recipe
    start = {"01_token_setup": {"champion": str(tmp_path / "champion")}}
    monkeypatch.setattr(arms, "recipe", lambda s, v: recipe(s, v) | SMALL[s] | start.get(s, {}))
    monkeypatch.setattr(baking, "sample_trajectories", plain_trajectories)
    monkeypatch.setattr(arms, "CONTROL_RATES", (1e-3, 2e-3))
    monkeypatch.setattr(arms, "SAMPLES", 3)
    monkeypatch.setattr(arms, "SEEN", 6)
    monkeypatch.setattr(arms, "pass_at", lambda right, k: 0.0)
    monkeypatch.setattr(reinforce, "SEEN", 6)
    return tmp_path / "experiments"


def test_every_kind_of_arm_becomes_a_row_once(small, monkeypatch):
    small.mkdir()
    names = ["raw", "answers alone", "filler", "baked", "reinforced", "expert iteration"]
    arms.real_model(small, [0], "smollm2", arms=names)
    rows = {row["arm"]: row for row in read_rows(small / "smollm2.csv")}
    assert list(rows) == names
    assert all(len(row["right"]) == 1 + 8 and set(row["right"][1:]) <= {"0", "1"} for row in rows.values())
    assert all(row["accuracy"] == row["right"].count("1") / 8 for row in rows.values())
    assert {"at 0.001", "at 0.002"} <= rows["filler"].keys() and rows["filler"]["rate"] in arms.CONTROL_RATES
    # as many passes as the prompts, baking (1 epoch of 2 steps) and reinforcement (2 steps of 6 replies) take together
    assert rows["answers alone"]["epochs"] == 1 + 1 + 1
    for arm in ("baked", "reinforced"):
        assert rows[arm]["greedy_8"] == rows[arm]["greedy"]  # the recipe here: eight tokens
        assert 0 <= sum(rows[arm][f"fault_{name}"] for name in ("arithmetic", "numbers", "operation", "steps")) <= 1
        row, better = rows[arm], max(rows["answers alone"]["accuracy"], rows["filler"]["accuracy"])
        assert row["checks"] >= row["checks_reached"] and row["moved"] >= 0
        assert row["control_gain"] == pytest.approx(row["accuracy_own"] - better, abs=1e-5)
        assert f'"{arm}"' in (small / f"episodes-{arm}-0.jsonl").read_text()
    assert (small / "models" / "difference-0").is_dir()
    monkeypatch.setattr(arms, "measured_arm", lambda *_: pytest.fail("trained again"))
    arms.real_model(small, [0], "smollm2", arms=names)


def test_the_gain_over_answers_alone_reaches_the_scoreboard(small):
    right = {("reinforced", 0): 0.6, ("reinforced", 1): 0.7, ("answers alone", 0): 0.25, ("answers alone", 1): 0.25}
    made = [{"arm": a, "seed": s, "settings": arms.TRAINED_ARMS[a], "accuracy": x} for (a, s), x in right.items()]
    write_rows(small / "smollm2.csv", made)
    arms.real_model(small, [0, 1], "smollm2", arms=["reinforced", "answers alone"])  # has its rows: nothing is trained
    over = json.loads((small / "over_answers_alone.json").read_text())
    assert over["value"] == pytest.approx(0.4) and over["seeds"] == 2 and over["low"] < 0.35


def test_other_problems_have_room_for_their_own_answers(small, monkeypatch):
    seen, cut = [], []
    real = arms.accuracy_with_thoughts

    def watched(model, tokenizer, asked, *given, **settings):
        seen.append((asked[0]["answer"], settings.get("max_new_tokens")))
        cut.append(settings["thought_length"])
        return real(model, tokenizer, asked, *given, **settings)

    monkeypatch.setattr(arms, "accuracy_with_thoughts", watched)
    model, tokenizer = tiny_quiet_star()
    some = list(problems(size=4))
    long = [p | {"answer": " ".join(["9"] * 12)} for p in some]
    arms.thinking_row(model, tokenizer, {"validation": some, "test": some, "gsm8k": long}, "thoughts", 6, 0)
    assert seen[-1][0] == long[0]["answer"] and seen[-1][1] >= 12 > seen[0][1]
    assert cut[-4:] == [8, 16, 24, 6]  # greedy thoughts of test problems, cut short; those of GSM8K are not


def test_an_arm_bakes_the_model_it_starts_from_where_it_is_not_there(small):
    small.mkdir()
    write_rows(
        small / "smollm2.csv", [{"arm": "baked", "seed": 3, "settings": arms.BAKED}]
    )  # committed without its model
    arms.real_model(small, [3], "smollm2", arms=["reinforced"])
    assert (small / "models" / "baked-3" / "model.safetensors").is_file()
    baked, reinforced = read_rows(small / "smollm2.csv")
    assert baked == {"arm": "baked", "seed": 3, "settings": arms.BAKED} and reinforced["arm"] == "reinforced"


def test_rows_of_other_problems_are_refused_and_stay(small, monkeypatch):
    small.mkdir()
    arms.real_model(small, [0], "smollm2", arms=[])
    before = (small / "smollm2_problems.csv").read_bytes()
    arms.real_model(small, [0], "smollm2", arms=[])
    monkeypatch.setitem(SMALL["02_dataset_generation"], "test_problems", 7)
    with pytest.raises(StageError, match="are of other test problems than DATA gives"):
        arms.real_model(small, [0], "smollm2", arms=["raw"])
    assert (small / "smollm2_problems.csv").read_bytes() == before


def test_the_command_line_takes_a_variant_its_data_and_its_arms(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(arms, "real_model", lambda *given: seen.append(given))
    command_line.main(["smollm2", "--seeds", "4", "--data", "here", "--arms", "raw", "baked"])
    assert seen == [(tmp_path / "smollm2" / "experiments", [4], "smollm2", "here", "", ["raw", "baked"])]
    with pytest.raises(WorkbookError, match="did you mean smollm2"):
        command_line.main(["smolm2"])


def test_pass_at_k_by_hand():
    right = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    # of four draws with one right one, two contain it in 1 - 3/6 of the cases
    assert arms.pass_at(right, 1) == pytest.approx((0.25 + 0 + 1) / 3)
    assert arms.pass_at(right, 2) == pytest.approx((0.5 + 0 + 1) / 3)
    assert arms.pass_at(right, 4) == pytest.approx(2 / 3)


def test_imitation_learns_and_keeps_the_best_epoch():
    model, tokenizer = tiny_lm()
    texts = [([5, 6, 7], [8, 9, tokenizer.eos_token_id])] * 12

    def likely():
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        with torch.no_grad():
            return model(ids).logits.log_softmax(-1)[0, [2, 3], [8, 9]].sum().item()

    before, seen, weights = likely(), iter([3.0, 1.0]), []

    def score():
        weights.append(model.state_dict()["lm_head.weight"].clone())
        return next(seen)

    settings = BakingSettings(epochs=2, batch_size=4, adamw_lr=1e-2, muon=False, rehearsal=0)
    assert arms.imitate(model, tokenizer, texts, settings, score) == [3.0, 1.0]
    assert torch.equal(model.lm_head.weight, weights[0]) and not torch.equal(weights[0], weights[1])
    assert likely() > before + 1


def test_a_filler_says_nothing_and_is_as_long_as_asked():
    _, tokenizer = tiny_lm()
    think, end, step, *_ = thinking_ids(tokenizer)
    assert arms.filler(tokenizer, 5) == [think, step, step, step, end]


def test_a_privileged_teacher_is_told_the_equations_and_the_control_others():
    some = problems()[:3]
    prompts = dict.fromkeys(prompts_with([], 0), "work it out .")
    alone, told, foreign = (baking.prompted(some, prompts, which) for which in ("none", "equation", "foreign"))
    for i, p in enumerate(some):
        assert alone[i] == asked(p, prompts) == f"work it out . {p['question']}"
        assert told[i] == f"{alone[i]} ( {' , '.join(p['steps'])} )"
        assert foreign[i] == f"{alone[i]} ( {' , '.join(some[i - 1]['steps'])} )"
    shown = prompts_with(problems(size=200), 1, told=True)["cot"].splitlines()[0]
    equation = shown.split(" ( ")[1].split(" ) ")[0]
    assert f"step {equation.split(' , ')[0]}" in shown.split(" ) ")[1]


def test_kept_states_give_the_teachers_distribution_back():
    model, tokenizer = tiny_lm()
    teacher, _ = tiny_lm(seed=1)
    items = plain_trajectories(teacher, tokenizer, problems()[:5])
    fresh = baking.aligned_log_probs(model, teacher, items, tokenizer)[1]
    baking.keep_states(teacher, items, batch_size=2)
    assert [len(i.states) for i in items] == [len(i.targets) for i in items]
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight.zero_()  # it is not read again
    kept = baking.aligned_log_probs(model, teacher, items, tokenizer)[1]
    assert torch.allclose(fresh, kept, atol=1e-5)


def test_training_keeps_to_problems_that_are_sometimes_right(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    some = problems()[:5]
    rates = {p["question"]: rate for p, rate in zip(some, (0, 0.25, 0.5, 0.875, 1), strict=True)}

    def drawn(model, tokenizer, asked, *_, num_thoughts, **__):
        right = [[1.0] * round(rates[p["question"]] * num_thoughts) for p in asked]
        return {"each": torch.tensor([r + [0.0] * (num_thoughts - len(r)) for r in right])}

    monkeypatch.setattr(reinforce, "accuracy_with_thoughts", drawn)
    within = reinforce.within_band(model, tokenizer, some, QuietStarSettings(pass_low=0.1, pass_high=0.8))
    assert {rates[p["question"]] for p in within} == {0.25, 0.5}
    assert reinforce.within_band(model, tokenizer, some, QuietStarSettings()) is some
    with pytest.raises(WorkbookError, match="none of 5 problems"):
        reinforce.within_band(model, tokenizer, some, QuietStarSettings(pass_low=0.6, pass_high=0.7))


def test_the_probability_of_the_truth_is_a_reward_between_0_and_1():
    model, tokenizer = tiny_quiet_star()
    ids, mask, positions = reinforce.think_where(model.lm, tokenizer, problems()[:3])
    thoughts = model.think(ids, mask, positions, torch.Generator().manual_seed(0))
    settings = QuietStarSettings(reward="probability", n_true=2, base_kl=0, kl_coefficient=0)
    _, _, (reward, _) = reinforce.quiet_star_loss(model, None, tokenizer, ids, mask, thoughts, settings)
    given = {"n_true": 2, "forbid_true": tuple(thinking_ids(tokenizer))}
    scored = reinforce.rescore_thoughts(model.lm, ids, thoughts, mask, **given)
    assert torch.allclose(reward, scored.true_logprobs[:, 0].sum(-1).exp(), atol=1e-6)
    assert (reward > 0).all() and (reward < 1).all()


def test_adamw_takes_all_and_the_head_has_a_rate_of_its_own():
    model, tokenizer = tiny_quiet_star()
    settings = QuietStarSettings(muon=False, adamw_lr=1e-4, head_lr=3e-3)
    _, optimizer = reinforce.prepared(model, model.lm, tokenizer, settings)
    groups = [(group["name"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
    head = len([*model.mixing_head.parameters(), *model.gain_head.parameters()])
    assert {name for name, *_ in groups} == {"adamw", "tokens"}
    assert max((lr, n) for name, lr, n in groups if name == "adamw") == (3e-3, head)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert isinstance(model, QuietStarForCausalLM)


def planted(arm, seed, right):
    return {"arm": arm, "seed": seed, "accuracy": sum(right) / len(right), "right": "r" + "".join(map(str, right))}


def test_planted_gains_are_judged():
    """Ten problems: the control answers one, and each arm as many more as its name says."""
    few = [1] + [0] * 9
    rows = [planted("answers alone", seed, few) for seed in range(3)]
    rows += [planted("reinforced", seed, [1] * (6 + seed % 2) + [0] * (4 - seed % 2)) for seed in range(3)]
    rows += [planted("baked", seed, [1] * 6 + [0] * 4) for seed in range(3)] + [planted("filler", 0, few)]
    said = {line.split(":")[0]: line for line in real_findings.judge_claims(rows)}
    assert said["reinforced - answers alone"].endswith("reached") and "+0.533" in said["reinforced - answers alone"]
    assert said["reinforced - baked"].endswith("NOT REACHED") and "+0.033" in said["reinforced - baked"]
    assert said["baked - filler"].endswith("Open") and "+0.500" in said["baked - filler"]
    assert said["reinforced - pg off"].endswith("not measured")
    table = real_findings.compare_arms(rows)
    assert table.loc["filler", "accuracy"] == "0.100" and table.loc["baked", "accuracy"].startswith("0.600 [")
    problems = [{"steps": 1 + (n > 4), "near": int(n == 0)} for n in range(10)]
    kinds = real_findings.by_kind(rows, problems)
    assert kinds.loc["baked"].tolist() == ["1.000", "0.200", "1.000", "0.556"]
    assert list(kinds) == ["1 step (5)", "2 steps or more (5)", "a training question is near (1)", "none is near (9)"]


def test_a_near_question_has_the_same_words_but_for_a_tenth():
    def asked(text):
        return {"question": text, "steps": ["1 + 1 = 2"]}

    words = "ann has some red pens and ben gives her more of them today"  # 13 words
    test = [asked(words + " 5 ?"), asked(words.replace("ann", "eve").replace("ben", "tom") + " ?"), asked("how many ?")]
    found = arms.describe({"train": [asked(words)], "examples": [], "test": test})
    assert found == [{"steps": 1, "near": 1}, {"steps": 1, "near": 0}, {"steps": 1, "near": 0}]
