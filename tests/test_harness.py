"""lm-evaluation-harness on local problems: its numbers against sums worked out from plain passes, offline."""

import json

import pytest
import torch
from test_families import wrapped
from tiny import problems

pytest.importorskip("lm_eval")
import qs_lib as qs
from qs_lib.data.tokens import encode_context
from qs_lib.errors import SourceError
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
