"""lm-evaluation-harness on local problems: its numbers against sums worked out from plain passes, offline."""

import json
from pathlib import Path

import pytest
import torch
from test_families import wrapped
from tiny import problems

pytest.importorskip("lm_eval")
import qs_lib as qs
from qs_lib.champion import build_champion, build_tokenizer
from qs_lib.data.tokens import encode, encode_context, padded
from qs_lib.errors import SourceError
from qs_lib.evaluation.accuracy import accuracy_with_thoughts
from qs_lib.files import find_run
from qs_lib.workbook import harness

PAIRS = [
    ("ben has 9 pens . ben finds 8 . how many pens ?", " 17 ."),
    ("tom has 3 .", " 3"),
    ("a box holds 4 cups .", " 4 red cups ."),
]


@pytest.fixture
def data(tmp_path):
    for split in ("train", "test"):
        rows = [{"question": p["question"], "answer": f"so .\n#### {p['answer']}"} for p in problems(split, 6)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def ids_of(lm, pair):
    return encode_context(lm.tokenizer, pair[0]), lm.tokenizer.encode(pair[1], add_special_tokens=False)


def by_hand(lm, pair, think):
    """One token at a time, no batch, no padding: the thoughts drawn after the text so far, then the mixture."""
    context, continuation = ids_of(lm, pair)
    total, greedy = 0.0, True
    for k, token in enumerate(continuation):
        text = torch.tensor([context + continuation[:k]])
        logits = lm.model(text, logits_to_keep=1, think=think).logits[0, -1].log_softmax(-1)
        total, greedy = total + logits[token].item(), greedy and logits.argmax().item() == token
    return total, greedy


@pytest.mark.parametrize("family", ["llama, tied", "gpt2", "mistral, window 6"])
@pytest.mark.parametrize("think", [False, True])
def test_log_likelihood_is_the_sum_by_hand(family, think):
    model, tokenizer = wrapped(family)
    lm = harness.ThinkingLM(model, tokenizer, think, batch_size=3)
    likeliest = (
        lm.model(torch.tensor([encode_context(tokenizer, PAIRS[1][0])]), logits_to_keep=1).logits[0, -1].argmax().item()
    )
    pairs = [*PAIRS, (PAIRS[1][0], " " + tokenizer.decode(likeliest))]
    requests = [(pair, *ids_of(lm, pair)) for pair in pairs]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for pair, (total, greedy) in zip(pairs, found, strict=True):
        assert (pytest.approx(total, abs=1e-3), greedy) == by_hand(lm, pair, think)
    assert found[-1][1] and not found[0][1]
    model.config.think = True


def test_thoughts_change_the_likelihood_and_only_scored_tokens_are_thought_before():
    model, tokenizer = wrapped("llama, tied")
    on, off = (harness.ThinkingLM(model, tokenizer, think, batch_size=2) for think in (True, False))
    requests, asked, think = [(None, *ids_of(on, pair)) for pair in PAIRS], [], model.think
    model.think = lambda ids, mask, positions: asked.append(int((positions >= 0).sum())) or think(ids, mask, positions)
    try:
        model.config.think = False
        plain = off._loglikelihood_tokens(requests, disable_tqdm=True)
        assert not asked
        model.config.think = True
        thinking = on._loglikelihood_tokens(requests, disable_tqdm=True)
    finally:
        del model.think
    assert sum(asked) == sum(len(r[2]) for r in requests) and len(asked) == 2
    assert all(abs(a[0] - b[0]) > 0.01 for a, b in zip(plain, thinking, strict=True))


@pytest.mark.parametrize("think", [False, True])
def test_the_tasks_run_offline_and_say_what_plain_code_says(data, think):
    model, tokenizer = wrapped("llama, tied")
    found = harness.run_harness(model, tokenizer, data, think=think, batch_size=2, limit=3)["results"]
    lm = harness.ThinkingLM(model, tokenizer, think)
    pairs = [(p["question"], f" {p['answer']}") for p in problems("test", 6)[:3]]
    mean = sum(by_hand(lm, pair, think)[0] for pair in pairs) / 3
    assert found["gsm8k_likelihood"]["perplexity,none"] == pytest.approx(torch.tensor(-mean).exp().item(), rel=1e-3)
    assert found["gsm8k_generate"]["exact_match,last-number"] in (0, 1 / 3, 2 / 3, 1)
    model.config.think = True


def test_the_committed_model_solves_in_the_harness_what_it_solves_elsewhere(data):
    model, tokenizer = qs.load_champion(str(find_run("") / "quietstar"))
    found = harness.run_harness(model, tokenizer, data, batch_size=6)["results"]
    assert found["gsm8k_generate"]["exact_match,last-number"] >= 5 / 6
    assert found["gsm8k_likelihood"]["perplexity,none"] < 3


def test_the_command_line_and_its_errors(data, tmp_path, capsys):
    model, tokenizer = wrapped("llama, tied")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    words = [
        str(tmp_path / "model"),
        str(data),
        "--limit",
        "1",
        "--tasks",
        "gsm8k_likelihood",
        "--output",
        str(tmp_path / "out.json"),
    ]
    assert harness.main(words) == 0 and "perplexity" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["n-samples"]["gsm8k_likelihood"]["effective"] == 1
    assert harness.main([words[0], str(tmp_path / "nowhere")]) == 1
    assert "a folder with train.jsonl and test.jsonl" in capsys.readouterr().err
    with pytest.raises(SourceError, match="known are gsm8k_generate"):
        harness.task_of("gsm9k", data)


GIVEN = ["so #### 7", "so #### 7 ", "so #### 7\r\n", "so ####7", "so #### 7 clips", "so #### 18.00", "so #### $7"]
GIVEN += ["so #### 1,200", "so #### −5", "so #### 5 1/2", "so #### 1 000"]


def test_the_gold_answer_is_the_one_that_load_problems_reads(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager, get_task_dict

    rows = [json.dumps({"question": f"q {i} ?", "answer": a}) for i, a in enumerate(GIVEN)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    manager = TaskManager(include_defaults=False)
    tasks = [get_task_dict([harness.task_of(name, tmp_path)], manager)[name] for name in harness.TASKS]
    truth = qs.load_problems(tmp_path, "test")["answer"]
    assert (
        [tasks[1].doc_to_target(doc) for doc in tasks[1].test_docs()]
        == list(truth)
        == [d["answer"] for d in tasks[0].test_docs()]
    )
    sentences = {
        "{} .": (1, 1),
        "It is {} , all in all ...": (1, 0),
        "1 + 1 = 2 , so {} .": (1, 0),
        "{}\nQ": (1, 1),
        "no .": (0, 0),
    }
    for doc, answer in zip(tasks[0].test_docs(), truth, strict=True):
        for sentence, scores in sentences.items():
            one = Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0)
            one.resps = [sentence.format(answer)]
            for each in tasks[0]._filters:
                each.apply([one])
            found = [one.filtered_resps[name] for name in ("last-number", "whole-reply")]
            assert tuple(tasks[0].process_results(doc, [f])["exact_match"] for f in found) == scores, (answer, sentence)


def test_problems_that_cannot_be_read_are_one_sentence(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "q ?", "answer": "#### 5,6"}')
    with pytest.raises(ValueError, match="x.jsonl:1: '5,6' is not one number"):
        harness.task_of("gsm8k_generate", tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        harness.run_harness(None, None, tmp_path, limit=0)


GSM8K = Path(__file__).parents[1] / ".." / "shared" / "data" / "gsm8k" / "test.jsonl"


def two_hundred(tmp_path):
    """The first 200 problems of GSM8K's test, or as many like them where it is not there."""
    if GSM8K.is_file():
        lines = GSM8K.read_text(encoding="utf-8").splitlines()[:200]
    else:
        asked = enumerate(problems("test", 200))
        lines = [json.dumps({"question": f"{p['question']} {n}", "answer": f"#### {p['answer']}"}) for n, p in asked]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return list(qs.load_problems(tmp_path, "test", distinct=False))


def taught(asked):
    """A model that has half learnt the answers behind an empty thought, so that some replies are right and some not."""
    tokenizer = build_tokenizer("pocket", [])
    tokenizer.model_max_length = 640
    lm = build_champion(tokenizer, hidden_size=48, heads=2, intermediate_size=96).eval()
    model = qs.QuietStarForCausalLM.from_base(*qs.add_thinking_tokens(lm, tokenizer), num_thoughts=2, thought_length=2)
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.6)
    model.config.thought_temperature, model.config.n_true = 0.0, 640  # the same thoughts, for a whole reply
    tags = [model.config.think_token_id, model.config.end_think_token_id]
    texts = [
        (encode_context(tokenizer, p["question"]), encode(tokenizer, "", f"{p['answer']} .").ids[1:]) for p in asked
    ]
    optimizer, order = torch.optim.AdamW(lm.parameters(), lr=3e-3), sorted(texts, key=lambda t: len(t[0]))
    for step in range(300):
        part = order[step * 20 % 200 : step * 20 % 200 + 20]
        ids, mask = padded(tokenizer, [context + tags + reply for context, reply in part], side="left")
        logits = lm(input_ids=ids, attention_mask=mask).logits[:, -4:-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -3:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def test_two_hundred_rows_are_scored_as_accuracy_scores_them(tmp_path):
    asked = two_hundred(tmp_path)
    model, tokenizer = taught(asked)
    budget = {"num_thoughts": 2, "thought_length": 2, "temperature": 0.0, "max_new_tokens": 24}
    elsewhere = accuracy_with_thoughts(model, tokenizer, asked, **budget)["mixed"].tolist()
    found = harness.run_harness(model, tokenizer, tmp_path, ["gsm8k_generate"], batch_size=40)
    rows = [s for s in found["samples"]["gsm8k_generate"] if s["filter"] == "whole-reply"]
    assert [row["doc"]["question"] for row in rows] == [p["question"] for p in asked]
    assert [row["exact_match"] for row in rows] == elsewhere and len(rows) == 200
    assert 5 < sum(elsewhere) < 195, "neither all right nor all wrong"
    assert found["results"]["gsm8k_generate"]["exact_match,whole-reply"] == pytest.approx(sum(elsewhere) / 200)
