import json
from collections import Counter

import pytest

import qs_lib as qs
from qs_lib.data import pocket
from qs_lib.data.answers import last_number, written_number
from qs_lib.data.problems import baking_data, parse_gsm8k

GSM8K = "Tom had 48 eggs.\nHe sold 48/2 = <<48/2=24>>24 eggs.\nHe has 1,000+24 = <<1000+24=1024>>1,024.\n#### 1,024"


def test_pocket_splits_do_not_overlap_and_are_reproducible():
    splits = {s: pocket.generate(s, 240, seed=1) for s in ("train", "validation", "test")}
    questions = {s: {p["question"] for p in records} for s, records in splits.items()}
    assert all(len(q) == 240 for q in questions.values())
    assert not questions["train"] & questions["test"] and not questions["validation"] & questions["test"]
    assert splits["test"] == pocket.generate("test", 240, seed=1) != pocket.generate("test", 240, seed=2)


def test_pocket_families_and_steps_come_in_equal_shares():
    records = pocket.generate("train", 240, seed=0)
    assert set(Counter((p["family"], p["difficulty"]) for p in records).values()) == {10}


def _simulate(question: str) -> int | None:
    """Solve chain questions by reading them, without looking at the steps."""
    words = question.split()
    name = words[-2]
    stock = {}
    for sentence in question.split(" . ")[:-1]:
        who, verb, amount, *_ = sentence.split()
        change = int(amount) * (-1 if verb in pocket.LOSSES else 1)
        stock[who] = int(amount) if verb == "has" else stock[who] + change
    return stock[name]


def test_answers_agree_with_a_reader_of_the_question():
    records = [p for p in pocket.generate("train", 480, seed=2) if p["family"] == "chain"]
    assert records and all(_simulate(p["question"]) == int(p["answer"]) for p in records)


def test_every_pocket_word_is_known_to_its_tokenizer():
    from qs_lib.champion import build_tokenizer
    from qs_lib.training.pretrain import corpus

    tokenizer = build_tokenizer("pocket", [])
    for context, reply in corpus(pocket.generate("train", 480, seed=0)):
        ids = tokenizer.encode(f"{context} {reply}", add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids, (context, reply)


def test_too_many_distinct_problems_is_one_sentence():
    with pytest.raises(ValueError, match="fewer than 5000 different test problems"):
        pocket.generate("test", 5000)


def test_gsm8k_answer_steps_and_difficulty():
    record = parse_gsm8k("How many?", GSM8K)
    assert record["answer"] == "1024" and record["difficulty"] == 2
    assert record["steps"] == ["48 / 2 = 24", "1000 + 24 = 1024"]


def test_gsm8k_false_arithmetic_keeps_the_problem_without_steps():
    record = parse_gsm8k("How many?", GSM8K.replace("=24>>", "=25>>"))
    assert record["steps"] == [] and record["fits"] == [] and record["answer"] == "1024"


def test_gsm8k_without_final_number():
    with pytest.raises(ValueError, match="no '#### number'"):
        parse_gsm8k("How many?", "It is 4.")


def test_folder_and_file_sources(tmp_path):
    rows = [{"question": f"How many are {i}?", "answer": GSM8K} for i in range(40)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, validation = (qs.load_problems(str(tmp_path), s)["question"] for s in ("train", "validation"))
    assert len(train) + len(validation) == 40 and validation and not set(train) & set(validation)
    assert len(qs.load_problems(str(tmp_path / "train.jsonl"), limit=7)) == 7


def test_bad_sources_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": 3')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 is not a JSON object"):
        qs.load_problems(str(tmp_path / "bad.jsonl"))
    with pytest.raises(FileNotFoundError, match="a folder with train.jsonl"):
        qs.load_problems(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="must be train, validation or test"):
        qs.load_problems("pocket", "dev")

    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="give their folder instead"):
        qs.load_problems("gsm8k")


def test_baking_shows_the_teacher_no_problem_with_a_worked_example():
    train = [{"question": str(i), "difficulty": i % 4} for i in range(40)]
    examples = train[:12]
    worked, unseen = baking_data(examples, train, 5, hard_shown=0.0, seed=1)
    assert len({e["question"] for e in worked}) == 5 and all(e in examples for e in worked)
    assert unseen == [p for p in train[12:] if p["difficulty"] < 3]
    everything, _ = baking_data(examples, train, 99, hard_shown=1.0)
    assert sorted(e["question"] for e in everything) == sorted(e["question"] for e in examples)


NUMBERS = """\u22125 > -5|-$5 > -5|- 5 > -5|$-5 > -5|minus 5 > -5|\uff0d3.50 kg > -3.5|-0 > 0|3/4 > 0.75|5 1/2 > 5.5|
5\u00bd > 5.5|-3/8 > -0.375|7/2 cups > 3.5|1 000 > 1000|1\u202f000\xa0000 > 1000000|1.000,50 > 1000.5|1'250 > 1250|
1.000.000 > 1000000|1,234,567.89 > 1234567.89|1e6 > 1000000|2.5e-3 > 0.0025|123456789.123 > 123456789.123|+5 > 5|
0.00001 > 0.00001|18.00 > 18|5. > 5|.5 > 0.5|$1,234.50 \t > 1234.5|7 clips > 7|5% > 5|x = -5 > -5|60 km/h > 60|
a 5-foot rope > 5|12 m\u00b2 > 12"""
IN_TWO_WAYS = """5,6|2 and 3|10:30|2^3|x-3|x - 3|1.5 million|5k|2 and a half|5-7|5\u20137|0,5|1,00,000|12,34|1/3|24/7|
4/0|1 000/3|5\u00b2|5!|\u00b15|(5)|--5|USD5|5\u4e07|1.5.2|1..5|1e400|1e-400|3 dozen|7\n8|5 \u00d7 10\u00b3|10/10/2020"""


@pytest.mark.parametrize("text, number", [pair.strip("\n").split(" > ") for pair in NUMBERS.split("|")])
def test_an_answer_is_the_number_that_stands_there(text, number):
    assert written_number(text) == number == parse_gsm8k("q", f"so\n#### {text}")["answer"]


@pytest.mark.parametrize("text", IN_TWO_WAYS.replace("|\n", "|").split("|"))
def test_what_could_be_read_in_two_ways_is_refused(text, tmp_path):
    (tmp_path / "x.jsonl").write_text("\n" + json.dumps({"question": "q", "answer": f"so\n#### {text}"}))
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "q ?", "answer": f"so\n#### {text}"}))
    with pytest.raises(ValueError, match=r"x.jsonl:1: .*(one number|in digits|too large|too small)"):
        qs.load_problems(tmp_path / "x.jsonl", "test")


def test_a_reply_is_read_by_the_same_reader():
    given = {
        "It is 7 , all in all ...": "7",
        "2 + 5 = 7 .": "7",
        "so -7": "-7",
        "5-7": "7",
        "$1,200 .": "1200",
        "no": "",
    }
    given |= {"3/4": "0.75", "\u22125 .": "-5", "18.00": "18", "9 - 11 = -2": "-2", "3 or 4, so 4.": "4"}
    assert {text: last_number(text) for text in given} == given


def rows_of(name: str, count: int) -> str:
    rows = [{"question": f"{name} has {i} cups . how many ?", "answer": f"#### {i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["mine.jsonl", "train.jsonl", "problems.txt"])
def test_one_file_gives_three_splits_apart(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).write_text(rows_of("ben", 90))
    splits = ("train", "validation", "test")
    found = [set(qs.load_problems(f"~/{name}", s)["question"]) for s in splits]
    assert sum(map(len, found)) == len(set.union(*found)) == 90 and all(found) and len(found[0]) > 50
    assert [set(qs.load_problems(tmp_path / name, s)["question"]) for s in splits] == found
    assert all({pocket.split_of(q) for q in questions} == {s} for questions, s in zip(found, splits, strict=True))


def test_a_validation_file_is_the_validation_split(tmp_path):
    for split, count in (("train", 80), ("test", 8)):
        (tmp_path / f"{split}.jsonl").write_text(rows_of(split, count))
    held_out = len(qs.load_problems(tmp_path, "validation"))
    assert held_out + len(qs.load_problems(tmp_path, "train")) == 80 and len(qs.load_problems(tmp_path, "test")) == 8
    for name in ("dev", "valid", "val"):
        (tmp_path / f"{name}.jsonl").write_text(rows_of(name, 8))
        with pytest.raises(ValueError, match=f"{name}.jsonl would not be read: call it validation.jsonl"):
            qs.load_problems(tmp_path, "validation")
        (tmp_path / f"{name}.jsonl").unlink()
    (tmp_path / "validation.jsonl").write_text(rows_of("validation", 9))
    for split, count in (("train", 80), ("validation", 9), ("test", 8)):
        found = qs.load_problems(tmp_path, split)["question"]
        assert len(found) == count and all(q.startswith(split) for q in found)


@pytest.mark.parametrize("limit", [0, -1, 2.5, "3"])
def test_a_limit_is_a_number_from_one(limit):
    with pytest.raises(ValueError, match="it must be a whole number from 1"):
        qs.load_problems("pocket", limit=limit)
    assert len(qs.load_problems("pocket", limit=1)) == 1


def test_a_repeated_problem_comes_once_and_a_contradicted_one_is_named(tmp_path):
    (tmp_path / "test.jsonl").write_text(rows_of("ben", 5) + rows_of("ben", 6))
    assert (
        len(qs.load_problems(tmp_path, "test")) == 6 and len(qs.load_problems(tmp_path, "test", distinct=False)) == 11
    )
    other = json.dumps({"question": " ben has 3 cups . how many ? ", "answer": "#### 4"})
    (tmp_path / "test.jsonl").write_text(rows_of("ben", 5) + other)
    with pytest.raises(ValueError, match="test.jsonl:6: the answer is 4, and 3 to the same question in line 4"):
        qs.load_problems(tmp_path, "test")


@pytest.mark.parametrize(
    "line, fault",
    [
        ('{"question": " ", "answer": "#### 1"}', "the question is blank"),
        ('{"question": "\\t\\n", "answer": "#### 1"}', "the question is blank"),
        ('{"question": "a", "question": "b", "answer": "#### 1"}', "a name stands there twice"),
        ('{"question": "a", "answer": ""}', "no '#### number'"),
        ('{"question": "a", "answer": "####"}', "no '#### number'"),
        ('{"question": "a", "answer": null}', "question and answer must be text"),
        ('{"question": "a", "answer": "#### ' + "1," * 300_000 + '"}', "is not one number"),
    ],
)
def test_blank_contradicting_and_huge_records_are_named(line, fault, tmp_path):
    (tmp_path / "test.jsonl").write_text(rows_of("ben", 2) + line)
    with pytest.raises(ValueError, match=f"test.jsonl:3.*{fault}"):
        qs.load_problems(tmp_path, "test")


def test_a_huge_solution_is_read_or_left_without_steps():
    for left in ("1+" * 100_000 + "1", "(" * 100_000, "9" * 100_000):
        assert parse_gsm8k("q", f"<<{left}=5>> #### 5")["steps"] == []
