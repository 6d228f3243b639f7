import numpy as np
import pytest
import torch
from tiny import problems, tiny_lm, tiny_quiet_star

from qs_lib import evaluate as e
from qs_lib.sequences import encode_context
from qs_lib.thoughts import Thoughts


def test_interval_covers_a_known_share_and_resamples_problems_not_thoughts():
    rng = np.random.default_rng(1)
    _mean, low, high = e.interval(rng.random(400) < 0.7)
    assert low < 0.7 < high and high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.15)
    repeated = np.repeat(rng.random((50, 1)) < 0.5, 40, axis=1)
    _, low, high = e.interval(repeated)
    assert high - low > 0.2  # 50 independent problems, not 2,000


def test_answer_is_what_follows_the_thought():
    _, tokenizer = tiny_lm()
    ids = tokenizer.encode("<think> <step> 9 + 8 = 17 </think> 17 .", add_special_tokens=False)
    assert e.answer_of(tokenizer, ids, (tokenizer.convert_tokens_to_ids("</think>"),)) == "17"
    assert e.answer_of(tokenizer, tokenizer.encode("12 .", add_special_tokens=False)) == "12"


def test_replies_do_not_depend_on_the_batch_and_obey_forbidden_ids():
    model, tokenizer = tiny_lm()
    contexts = [p["question"] for p in problems(size=9)]
    together = e.replies(model, tokenizer, contexts, max_new_tokens=6)
    assert together == e.replies(model, tokenizer, contexts, max_new_tokens=6, batch_size=1)
    banned = {i for r in together for i in r}
    assert banned and not banned & {i for r in e.replies(model, tokenizer, contexts, 6, tuple(banned)) for i in r}


def reply_again(model, tokenizer, context, thoughts, weights, steps):
    """Mixture of plain forward passes, without cache or padding."""
    written = []
    for _ in range(steps):
        rows = [context + written, *(context + t + written for t in thoughts)]
        hidden = torch.stack([model.lm.model(torch.tensor([r])).last_hidden_state[0, -1] for r in rows])
        given = None if weights == "head" else torch.tensor([0.0] + [1 / len(thoughts)] * len(thoughts))
        chosen = model.mix(hidden[0], hidden[1:], given).argmax().item()
        if chosen == tokenizer.eos_token_id:
            break
        written.append(chosen)
    return written


@pytest.mark.parametrize("weights", ["head", "thoughts"])
def test_decoding_with_given_thoughts_equals_plain_passes(weights):
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.6)
    contexts = [encode_context(tokenizer, p["question"]) for p in problems(size=4)]
    tokens = torch.randint(0, 100, (4, 2, 6), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[6, 3], [2, 5], [4, 4], [6, 6]])
    out = e.decode_with_thoughts(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens=3)
    for row in range(4):
        thoughts = [t[:n] for t, n in zip(tokens[row].tolist(), lengths[row].tolist(), strict=True)]
        assert out[row] == reply_again(model, tokenizer, contexts[row], thoughts, weights, 3)


def test_a_model_that_copies_the_thought_scores_by_its_thoughts(monkeypatch):
    """A fake reader that answers with the last word of the thought: accuracy must be the share of right thoughts."""
    model, tokenizer = tiny_quiet_star()
    asked = problems(size=6)
    right = {p["question"]: i % 2 == 0 for i, p in enumerate(asked)}

    def think(ids, mask, positions, generator, num_thoughts, thought_length, temperature):
        rows = []
        for row, keep in zip(ids, mask, strict=True):
            question = tokenizer.decode(row[keep.bool()][1:])
            answer = next(p["answer"] for p in asked if p["question"] == question)
            word = answer if right[question] else "40"
            rows.append([tokenizer.convert_tokens_to_ids(w) for w in ("<think>", word, "</think>")])
        tokens = torch.tensor(rows)[:, None, None].expand(-1, 1, num_thoughts, -1).contiguous()
        shape = tokens.shape
        return Thoughts(tokens, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), torch.full(shape[:3], 3),
                        torch.zeros(*shape[:3], 32), positions, 1.0, (), *tokens[0, 0, 0, [0, 2]].tolist())  # fmt: skip

    def decode(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens):
        return [[row[0, 1].item(), tokenizer.convert_tokens_to_ids(".")] for row in tokens]

    monkeypatch.setattr(model, "think", think)
    monkeypatch.setattr(e, "decode_with_thoughts", decode)
    scores = e.accuracy_with_thoughts(model, tokenizer, asked, num_thoughts=2, single=True)
    assert scores["mixed"].tolist() == [1, 0, 1, 0, 1, 0] and scores["each"].mean() == 0.5


def test_best_temperature_is_picked_by_validation(monkeypatch):
    table = {0.0: 0.2, 0.5: 0.8, 1.0: 0.6}
    monkeypatch.setattr(e, "accuracy_with_thoughts", lambda *a, temperature, **k: {"mixed": torch.tensor([table[temperature]])})
    found = e.best_temperature(None, None, [], tuple(table))
    assert found["temperature"] == 0.5 and found["accuracy"] == pytest.approx(0.8)
