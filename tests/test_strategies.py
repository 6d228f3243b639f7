from fractions import Fraction

import pytest

from qs_lib.data import pocket
from qs_lib.data import strategies as s
from qs_lib.data.problems import parse_gsm8k


@pytest.mark.parametrize(
    "text, value", [("9 + 8", 17), ("12 * 1.25", 15), ("2 * (3 - 5)", -4), ("7 / 2", Fraction(7, 2))]
)
def test_exact_value(text, value):
    assert s.exact_value(text) == value


@pytest.mark.parametrize("text", ["__import__('os')", "2 ** 9", "1 / 0", "a + 1", "", "1 +"])
def test_exact_value_refuses(text):
    with pytest.raises(ValueError, match="not plain arithmetic"):
        s.exact_value(text)


def test_each_strategy_has_a_body_of_its_own_that_ends_on_the_answer():
    steps = ["2 * 3 = 6", "4 * 5 = 20", "6 + 20 = 26"]
    bodies = {k: s.body(k, steps) for k in ("cot", *s.STRATEGIES)}
    assert len(set(bodies.values())) == 8
    assert all(b.split()[-1] == "26" for b in bodies.values())
    assert {k: s.strategy_of(b) for k, b in bodies.items()} == {k: k for k in bodies}
    assert bodies["multidomain"].startswith("reason fields 2 ") and bodies["mece"].startswith("parts 2 3 4 5 step")
    assert "26 - 20 = 6 so 26" in bodies["doubt"] and bodies["expert"].startswith("expert times times plus ")


def test_dataset_is_complete_checked_and_apart_from_held_out():
    held = pocket.generate("test", 120)
    data = s.reasoning_dataset(pocket.generate("train", 4000), held, cot=40, per_strategy=20)
    counts = {
        k: data["train"]["strategy"].count(k)
        if isinstance(data["train"]["strategy"], list)
        else sum(x == k for x in data["train"]["strategy"])
        for k in ("cot", *s.STRATEGIES)
    }
    assert counts == {"cot": 40, **dict.fromkeys(s.STRATEGIES, 20)}
    questions = list(data["train"]["question"])
    assert len(set(questions)) == len(questions) and not set(questions) & {p["question"] for p in held}
    assert not any(s.check({**row, "strict": True}) for row in data["train"])


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("= 17", "= 18", "is false"),
        ("step 9 + 8 = 17", "step 5 + 12 = 17", "comes from nowhere"),
        ("done 13", "done 14", "does not end on the answer"),
        ("parts 9 8", "expert plus", "reads as expert"),
    ],
)
def test_planted_faults_are_found(old, new, fault):
    example = {
        "question": "a box holds 9 red 8 blue pens . 4 are lost . how many in all ?",
        "answer": "13",
        "strategy": "mece",
        "fits": ["mece"],
        "strict": True,
        "reply": "think parts 9 8 step 9 + 8 = 17 step 17 - 4 = 13 done 13 .",
    }
    assert s.check(example) == []
    assert any(fault in f for f in s.check({**example, "reply": example["reply"].replace(old, new)}))


def test_too_few_problems_names_the_strategy():
    with pytest.raises(ValueError, match="fit mece, 900 are needed"):
        s.reasoning_dataset(pocket.generate("train", 240), per_strategy=900)


@pytest.mark.parametrize(
    "steps, doubted",
    [
        (["100 / 7 = 14.29"], False),
        (["1 / 1000 = 0"], False),
        (["9 + 1 = 10", "10 / 300 = 0.03"], False),
        (["22.5 / 9 = 2.5"], True),
        (["3.333 * 3 = 10"], True),
        (["0 / 7 = 0"], True),
    ],
)
def test_a_rounded_step_is_kept_and_not_doubted(steps, doubted):
    worked = " ".join(f"<<{step}>>" for step in steps) + f" #### {s.result(steps[-1])}"
    problem = parse_gsm8k("how many are 100 / 7 ?", worked)
    assert problem["steps"] == steps and ("doubt" in problem["fits"]) == doubted
    for strategy in ("cot", *problem["fits"]):
        example = problem | {"strategy": strategy, "reply": s.reply(strategy, problem)}
        assert s.check(example) == []


@pytest.mark.parametrize("strategy", ["orthogonal", "mece", "bayesian"])
def test_a_strategy_that_no_problem_fits_is_named_and_no_example(strategy):
    pool = [p for p in pocket.generate("train", 480) if strategy not in p["fits"]]
    with pytest.raises(ValueError, match=f"^0 problems fit {strategy}, 4 are needed: load more problems$"):
        s.reasoning_dataset(pool, cot=4, per_strategy=4)


def test_plain_reasoning_suits_everything_where_no_family_claims_it():
    pool = [p for p in pocket.generate("train", 480) if "cot" not in p["fits"]]
    assert list(s.reasoning_dataset(pool, cot=4, per_strategy=4)["train"]["strategy"]).count("cot") == 4
    with pytest.raises(ValueError, match="cot"):
        s.reasoning_dataset(pool, cot=-4, per_strategy=4)


def test_numbers_are_compared_as_numbers():
    worked = "4*2.50=<<4*2.50=10>>10\n10-.50=<<10-.50=9.50>>9.50\n9.5*2=<<9.5*2=19>>19\n#### 19"
    problem = parse_gsm8k("Ann buys 4 pens at $2.50 each, 0.5 off. What are 2 of these?", worked)
    assert problem["steps"] == ["4 * 2.5 = 10", "10 - 0.5 = 9.5", "9.5 * 2 = 19"]
    assert s.fresh_operands(problem["steps"]) == [["4", "2.5"], ["0.5"], ["2"]]
    example = problem | {"strategy": "cot", "reply": s.reply("cot", problem), "strict": True}
    assert s.check(example) == []
    assert s.check(example | {"question": "Ann buys 4 pens at $2.05 each, 0.5 off. What are 2 of these?"}) == [
        "2.5 in 4 * 2.5 = 10 comes from nowhere"
    ]
