import json
from collections import Counter

import pytest

import qs_lib as qs
from qs_lib.data import pocket
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

    monkeypatch.setattr("qs_lib.data.problems.load_dataset", unreachable)
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
