"""Thoughts inside GSM8K's worked solutions: the texts, which tokens are results, and the experiment on a tiny model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_lm, tiny_quiet_star

from qs_lib.data.problems import solution_text
from qs_lib.data.tokens import encode, encode_context, encode_marked, thinking_ids
from qs_lib.errors import SourceError
from qs_lib.experiments import solutions
from qs_lib.files import read_rows

QUESTION = "ana has 3 books . ana buys 4 . how many books has ana ?"


def told(a: int, b: int) -> dict:
    """A record in GSM8K's form, in the words of the tiny tokenizer."""
    worked = f"ana has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} books .\nso ana has {a + b} books .\n#### {a + b}"
    return {"question": QUESTION.replace("3", str(a)).replace("4", str(b)), "answer": worked}


def test_a_solution_is_a_text_without_annotations_and_its_results():
    worked = "Half is 48/2 = <<48/2=24>>24 clips.\nBoth are 48+24 = <<48+24=70>>70.\nSo 3 < 4.\n#### 72"
    found = solution_text("She sold  48\nclips. How many?", worked)
    assert found["question"] == "She sold 48 clips. How many?"
    assert found["story"] == "Half is 48/2 = 24 clips. Both are 48+24 = 70. So 3 < 4."
    (result,) = found["results"]  # 48 + 24 is not 70
    assert result["before"] == found["question"] and result["answer"] == "Half is 48/2 = 24 clips."
    assert result["steps"] == ["48 / 2 = 24"]


def test_a_thinking_token_in_a_solution_is_plain_text():
    _, tokenizer = tiny_lm()
    worked = "<think>ana has 3 + 4 = <<3+4=7>>7 books .</think>\nso ana has 7 .\n#### 7"  # as other models' traces have
    whole = encode(tokenizer, *solutions.text_of(solution_text(QUESTION, worked)))
    assert not set(thinking_ids(tokenizer)) & set(whole.ids)


def test_calculations_are_left_out_and_their_results_stay():
    worked = "Half is 48/2 = <<48/2=24>>24 clips.\nThey cost ($3 + $1) x 2=$<<(3+1)*2=8>>8, he has 24+8.\n#### 8"
    found = solution_text("She sold 48 clips. How much?", worked, working=False)
    assert found["story"] == "Half is 24 clips. They cost $8, he has 24+8."
    assert [r["answer"] for r in found["results"]] == ["Half is 24 clips.", "They cost $8, he has 24+8."]
    assert [r["steps"] for r in found["results"]] == [["48 / 2 = 24"], ["( 3 + 1 ) * 2 = 8"]]


def test_solutions_that_calculate_in_words_are_left_out(tmp_path):
    rows = [told(3, 4), told(5, 6)]
    rows[1]["answer"] = rows[1]["answer"].replace("5 + 6 = <<", "5 books + 6 books = <<")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (found,) = solutions.read_solutions(str(tmp_path), "train", working=False)
    assert found["story"] == "ana has 7 books . so ana has 7 books ."


def test_where_nothing_is_calculated_results_are_the_numbers_that_are_new():
    _, tokenizer = tiny_lm()
    whole = encode(tokenizer, QUESTION, "ana has 7 books . so ana has 7 , not 4 , and 2 more than 5 .")
    found = solutions.results_in(tokenizer, whole.ids, whole.start)
    assert [tokenizer.decode([i]) for i in np.array(whole.ids)[found]] == ["7", "2", "5"]


def test_solutions_that_say_a_thinking_word_are_left_out_and_a_missing_folder_is_named(tmp_path):
    rows = [told(3, 4), told(5, 6) | {"question": "Ana is Done with 5 and 6 . how many ?"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (found,) = solutions.read_solutions(str(tmp_path), "train")
    assert found["question"].startswith("ana has 3 books")
    with pytest.raises(SourceError, match=r"no solutions at .*test\.jsonl: give the folder"):
        solutions.read_solutions(str(tmp_path), "test")


def test_results_are_the_numbers_behind_an_equals_sign():
    _, tokenizer = tiny_lm()
    text = (QUESTION, "ana has 3 + 4 = 7 books . so ana has 7 books .")
    found = solutions.says_result(tokenizer, [text], 0)
    words = f"{QUESTION} {text[1]}".split()
    assert [words[i + 1] for i in np.flatnonzero(found[0])] == ["7"] and words[np.flatnonzero(found[0])[0]] == "="


def told_stories(*sums) -> list[dict]:
    return [solution_text(record["question"], record["answer"]) for record in (told(a, b) for a, b in sums)]


def test_a_lesson_is_the_text_with_its_true_equation_in_the_sentence_and_most_often_before_the_result(monkeypatch):
    monkeypatch.setattr(solutions, "TOLD", 1.0)
    _, tokenizer = tiny_lm()
    (story,) = told_stories((3, 4))
    whole = encode(tokenizer, *solutions.text_of(story))
    start, end, *_ = thinking_ids(tokenizer)
    seen = []
    for seed in range(200):
        ((context, reply),) = solutions.solution_lessons(tokenizer, [story], seed)
        opened, closed = reply.index(start), reply.index(end) + 1
        assert context == whole.ids[: whole.start] and tokenizer.decode(reply[opened + 2 : closed - 1]) == "3 + 4 = 7"
        assert reply[:opened] + reply[closed:] == whole.ids[whole.start :]
        seen.append(tokenizer.decode(reply[closed : closed + 1]))
    assert set(seen) == {"ana", "has", "3", "+", "4", "=", "7", "books", "."} and 90 <= seen.count("7") <= 130


def test_each_result_of_a_solution_has_its_own_thought_in_its_own_sentence(monkeypatch):
    monkeypatch.setattr(solutions, "TOLD", 1.0)
    _, tokenizer = tiny_lm()
    worked = "ana has 3 + 4 = <<3+4=7>>7 books .\nben has 5 + 2 = <<5+2=7>>7 books .\n#### 7"
    story = solution_text(QUESTION, worked)
    start, end, *_ = thinking_ids(tokenizer)
    for seed in range(20):
        ((_, reply),) = solutions.solution_lessons(tokenizer, [story], seed)
        words = tokenizer.decode(reply).split()
        assert reply.count(start) == reply.count(end) == 2
        first, second = " ".join(words).split("3 + 4 = 7 </think>", 1)
        assert "5 + 2" not in first and "<think>" in second and "5 + 2 = 7 </think>" in second


def test_half_of_the_results_are_read_without_a_thought():
    _, tokenizer = tiny_lm()
    stories = told_stories(*((a, b) for a in range(2, 8) for b in range(2, 7)))
    start, *_ = thinking_ids(tokenizer)
    lessons = [solutions.solution_lessons(tokenizer, stories, seed) for seed in range(10)]
    shares = [sum(start in reply for _, reply in told) / len(stories) for told in lessons]
    assert 0.4 < sum(shares) / 10 < 0.6
    bare = next(reply for _, reply in lessons[0] if start not in reply)
    assert bare in [(whole := encode(tokenizer, *solutions.text_of(s))).ids[whole.start :] for s in stories]


def test_a_result_is_read_without_a_thought_after_its_own_and_after_the_true_one(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    stories = told_stories((3, 4), (5, 2))
    budget = {"num_thoughts": 2, "thought_length": 8, "temperature": 1.0, "seed": 0}
    found = solutions.at_results(model, tokenizer, stories, **budget)
    expected = []
    for thought in ("", " think step 3 + 4 = 7 done", " think step 5 + 2 = 7 done"):
        numbers = "5 + 2" if "5" in thought else "3 + 4"
        question = stories["5" in thought]["question"]
        ids = encode_context(tokenizer, question) + encode_marked(tokenizer, f"ana has {numbers} ={thought}")
        logits = model.lm(torch.tensor([ids])).logits[0, -1]
        logits[thinking_ids(tokenizer)] = -torch.inf  # never written as text
        expected.append(logits.log_softmax(-1)[tokenizer.convert_tokens_to_ids("7")].item())
    assert found["result_told"] == pytest.approx((expected[1] + expected[2]) / 2, abs=1e-5)
    one = solutions.at_results(model, tokenizer, stories[:1], **budget)
    assert one["result_plain"] == pytest.approx(expected[0], abs=1e-5) and one["thoughts_true"] == 0
    assert one["result_mixed"] == pytest.approx(one["result_plain"], abs=1e-5)  # a new head starts without thoughts

    def told_right(ids, mask, at, *_, **__):
        thoughts = [solutions.worked_thought(tokenizer, s["results"][0]) for s in stories]
        wrong = solutions.worked_thought(tokenizer, {"steps": ["3 + 5 = 8"]})
        return SimpleNamespace(tokens=torch.tensor([[[t, wrong]] for t in thoughts]))

    monkeypatch.setattr(model, "think", told_right)
    mixed = {"without": torch.tensor([[-2.0], [-1.0]]), "with": torch.tensor([[-0.5], [-0.25]])}
    mixed["alone"] = torch.tensor([[-4.0], [-3.0]])
    monkeypatch.setattr(solutions.likelihood, "predicted", lambda *_: mixed)
    found = solutions.at_results(model, tokenizer, stories, **budget)
    assert (found["result_plain"], found["result_mixed"], found["result_alone"]) == (-1.5, -0.375, -3.5)
    assert found["thoughts_true"] == 0.5


@pytest.mark.parametrize("arm", solutions.TRAININGS)
def test_the_experiment_runs_on_a_tiny_model_and_does_not_repeat_a_row(arm, tmp_path, monkeypatch):
    for split, size in (("train", 30), ("test", 6)):
        rows = [told(a, b) for a in range(2, 8) for b in range(2, 7)][:size]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"steps": 2, "batch_size": 4, "num_positions": 2, "num_thoughts": 2, "thought_length": 6, "lora_rank": 2}
    small |= {"evaluate_every": 2, "n_true": 2, "gradient_checkpointing": False}
    monkeypatch.setattr(solutions, "TRAININGS", {arm: solutions.TRAININGS[arm] | small})
    for name, value in {"FOR_HEAD": 6, "JUDGED": 3, "READ_LAST": 6, "PLACES": 0}.items():
        monkeypatch.setattr(solutions, name, value)
    monkeypatch.setattr(solutions, "champion", lambda variant, run: tiny_lm())
    (row,) = solutions.solutions(tmp_path, [0], "smollm2", str(tmp_path))
    for part in ("all", "results", "hardest"):
        for control in ("without", "temperature", "foreign", "filler"):
            low, value, high = (row[f"{part}_over_{control}{end}"] for end in ("_low", "", "_high"))
            assert low <= value <= high
    assert len(row["text_gains"]) == 2 and row["plain"] < 0 and 0 <= row["thoughts_true"] <= 1
    assert row["plain"] != row["untrained_plain"] and row["result_told"] != row["imitated_result_told"]
    monkeypatch.setattr(solutions, "champion", lambda variant, run: pytest.fail("trained again"))
    assert (
        solutions.solutions(tmp_path, [0], "smollm2", str(tmp_path)) == [row] == read_rows(tmp_path / "solutions.csv")
    )
