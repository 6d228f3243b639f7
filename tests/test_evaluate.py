import numpy as np
import pytest
import torch
from tiny import problems, tiny_lm, tiny_quiet_star

from qs_lib import stats
from qs_lib.data.batches import answer_batch
from qs_lib.data.tokens import encode_context, thinking_ids
from qs_lib.evaluation import accuracy as e


def test_interval_covers_a_known_share_and_resamples_problems_not_thoughts():
    rng = np.random.default_rng(1)
    _mean, low, high = stats.interval(rng.random(400) < 0.7)
    assert low < 0.7 < high and high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.15)
    repeated = np.repeat(rng.random((50, 1)) < 0.5, 40, axis=1)
    _, low, high = stats.interval(repeated)
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


@pytest.mark.parametrize("weights, streams", [("head", 2 + 3), ("thoughts", 1 + 2)])
def test_thoughts_that_are_alike_are_read_once(weights, streams, monkeypatch):
    """Row 0 has one thought three times, row 1 two that differ in length alone. The text alone is read if it is weighed."""
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.6)
    contexts = [encode_context(tokenizer, p["question"]) for p in problems(size=2)]
    tokens = torch.randint(0, 100, (2, 1, 6), generator=torch.Generator().manual_seed(1)).expand(2, 3, 6)
    lengths, rows, read = torch.tensor([[5, 5, 5], [4, 6, 4]]), [], model.read
    counted = lambda ids, *rest, **given: rows.append(len(ids)) or read(ids, *rest, **given)
    monkeypatch.setattr(model, "read", counted)
    out = e.decode_with_thoughts(model, tokenizer, contexts, tokens, lengths, weights, max_new_tokens=3)
    assert set(rows) == {streams}
    for row in range(2):
        thoughts = [t[:n] for t, n in zip(tokens[row].tolist(), lengths[row].tolist(), strict=True)]
        assert out[row] == reply_again(model, tokenizer, contexts[row], thoughts, weights, 3)


@pytest.fixture(scope="module")
def taught():
    """A model that has learnt what to write after an empty thought, and the problems.

    It writes two answers, one without its stop, one wrong, one wrong with the true one behind it.
    """
    model, tokenizer = tiny_quiet_star(thought_length=2)
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.6)
    asked = [p | {"question": f"{p['question']} {n} ?"} for n, p in enumerate(problems(size=5))]
    said = [
        asked[0]["answer"] + " .",
        asked[1]["answer"] + " .",
        asked[2]["answer"],
        "40 .",
        "40 . " + asked[4]["answer"] + " .",
    ]
    rows = []
    for p, reply in zip(asked, said, strict=True):
        context, written = encode_context(tokenizer, p["question"]), tokenizer.encode(reply) + [tokenizer.eos_token_id]
        rows.append(
            (
                torch.tensor([[*context, model.config.think_token_id, model.config.end_think_token_id, *written]]),
                len(written),
            )
        )
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=1e-2)
    for _ in range(120):
        loss = sum(
            torch.nn.functional.cross_entropy(model.lm(ids).logits[0, -n - 1 : -1], ids[0, -n:]) for ids, n in rows
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    return model, tokenizer, asked


@pytest.mark.parametrize("weights", ["head", "thoughts"])
def test_only_replies_that_one_pass_leaves_open_are_decoded(taught, weights, monkeypatch):
    model, tokenizer, asked = taught
    empty = [[model.config.think_token_id, model.config.end_think_token_id]] * 2
    again = [reply_again(model, tokenizer, encode_context(tokenizer, p["question"]), empty, weights, 6) for p in asked]
    right = [float(e.answer_of(tokenizer, w) == p["answer"]) for w, p in zip(again, asked, strict=True)]
    decoded, decode = [], e.decode_with_thoughts
    monkeypatch.setattr(
        e,
        "decode_with_thoughts",
        lambda m, t, contexts, *given: decoded.extend(contexts) or decode(m, t, contexts, *given),
    )
    found = e.accuracy_with_thoughts(
        model, tokenizer, asked, num_thoughts=2, thought_length=2, weights=weights, batch_size=2
    )
    if weights == "thoughts":
        assert right == [1, 1, 1, 0, 0]
        assert sorted(decoded) == sorted(encode_context(tokenizer, p["question"]) for p in asked[2:3])
    assert found["mixed"].tolist() == right and found["thoughts"] == [["", ""]] * 5
    single = e.accuracy_with_thoughts(
        model, tokenizer, asked, num_thoughts=2, thought_length=2, weights=weights, single=True
    )
    assert single["each"].tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    cut = e.accuracy_with_thoughts(
        model, tokenizer, asked, num_thoughts=2, thought_length=2, weights="thoughts", max_new_tokens=1
    )
    assert cut["mixed"].tolist() == [1, 1, 1, 0, 0]  # the stop is not part of an answer
    alone = e.first_difference(model, *taken(model, tokenizer, asked), "thoughts", max_new_tokens=0)[1]
    assert (alone == e.TOO_LONG).all()


def taken(model, tokenizer, asked):
    ids, mask, last = answer_batch(tokenizer, asked)
    return ids, mask, model.think(ids, mask, last, num_thoughts=2, thought_length=2)


def test_the_temperature_is_picked_by_validation_and_of_equals_the_highest(monkeypatch):
    (model, tokenizer), validation, test = tiny_quiet_star(), problems(size=1), problems(size=2)
    table = {0.0: 0.2, 0.5: 0.75, 1.0: 0.25, 0.9: 0.75}
    asked = []

    def answered(_, __, problems, *a, temperature, **k):
        asked.append((len(problems), temperature))
        right = torch.tensor([table[temperature]])
        return {"mixed": right, "each": right, "thoughts": [["step"]] * len(problems)}

    monkeypatch.setattr(e, "accuracy_with_thoughts", answered)
    found = e.measure(model, tokenizer, validation, test, "head", tuple(table), max_new_tokens=4)
    assert found.temperature == 0.9 and found.by_temperature == pytest.approx(table)
    assert asked == [*((1, t) for t in table), (2, 0.9), (2, 0.0)]  # then test problems, and one greedy thought


@pytest.mark.parametrize("answer, spelt", [("17", True), ("70000", False), ("-5", False), ("1.5", False)])
def test_a_reply_is_right_only_if_its_text_is(answer, spelt, monkeypatch):
    """A vocabulary that cannot spell an answer has the same token for any other."""
    model, tokenizer = tiny_quiet_star(num_thoughts=2, thought_length=2)
    asked = [problems(size=1)[0] | {"answer": answer}]
    everywhere = torch.full((1, 2), e.WRITTEN), torch.full((1, 2, 2), e.WRITTEN)
    monkeypatch.setattr(e, "first_difference", lambda *a: everywhere)
    monkeypatch.setattr(e, "decode_with_thoughts", lambda *a: [tokenizer.encode(f"{answer} .")] * len(a[2]))
    found = e.accuracy_with_thoughts(model, tokenizer, asked, single=True, num_thoughts=2, thought_length=2)
    assert found["mixed"].tolist() == [spelt] and found["each"].tolist() == [[spelt] * 2]


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_answers_without_a_thought_are_written_alike_by_both_decoders(penalty):
    model, tokenizer = tiny_quiet_star()
    model.lm.generation_config.repetition_penalty = penalty  # as instruction-tuned checkpoints have
    questions = [p["question"] for p in problems()]
    contexts, (start, end, *_) = [encode_context(tokenizer, q) for q in questions], thinking_ids(tokenizer)
    thoughts, lengths = torch.tensor([[[start, end]]] * len(questions)), torch.full((len(questions), 1), 2)
    plain = e.replies(model.lm, tokenizer, questions, 4, tuple(thinking_ids(tokenizer)))
    assert e.decode_with_thoughts(model, tokenizer, contexts, thoughts, lengths, "none", 4) == plain


def test_a_reply_with_thoughts_ends_with_its_line(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    question = problems()[0]["question"]
    (start, end, *_), given = thinking_ids(tokenizer), (model, tokenizer, [encode_context(tokenizer, question)])
    thought = torch.tensor([[[start, end]]]), torch.tensor([[2]])
    (whole,) = e.decode_with_thoughts(*given, *thought, "none", 4)
    monkeypatch.setattr(e, "line_ends", lambda tokenizer: whole[1:2])
    assert e.decode_with_thoughts(*given, *thought, "none", 4) == [whole[: whole.index(whole[1])]]
    assert (
        e.replies(model.lm, tokenizer, [question], 4, tuple(thinking_ids(tokenizer)))[0]
        == whole[: whole.index(whole[1])]
    )
