"""The probability of the true answer, against one plain forward pass per problem, thought and token."""

import numpy as np
import pytest
import torch
from tiny import tiny_quiet_star

from qs_lib.data import pocket
from qs_lib.evaluation.episodes import draw_thoughts
from qs_lib.evaluation.likelihood import answer_probability, fitted


def by_hand(model, tokenizer, problem, thoughts, words, sharpening):
    """Product over "ANSWER ." of probabilities renormalised over ``words``, a mean over thoughts at each token."""
    allowed, out, written = tokenizer.convert_tokens_to_ids(words), 1.0, []
    context = [tokenizer.bos_token_id, *tokenizer.encode(problem["question"], add_special_tokens=False)]
    for word in (problem["answer"], "."):
        each = []
        for thought in thoughts:
            with torch.no_grad():
                logits = model.lm(torch.tensor([[*context, *thought, *written]])).logits[0, -1].double()
            each.append((logits[allowed] / sharpening).softmax(0)[words.index(word)].item())
        out *= np.mean(each)
        written.append(tokenizer.convert_tokens_to_ids(word))
    return out


@pytest.fixture(scope="module")
def given():
    model, tokenizer = tiny_quiet_star()
    problems = pocket.generate("test", 6, 3)
    return model, tokenizer, problems, sorted({p["answer"] for p in problems} | {"."})


def test_probabilities_are_those_of_plain_forward_passes(given):
    model, tokenizer, problems, words = given
    settings = {"num_thoughts": 2, "thought_length": 5}
    drawn = draw_thoughts(model.think, tokenizer, [p["question"] for p in problems], 1, **settings)
    found = answer_probability(model, tokenizer, problems, (0.5, 1.0), "thoughts", seed=1, **settings)
    for i, problem in enumerate(problems):
        ends = drawn[i].lengths[0, 0].tolist()
        thoughts = [drawn[i].tokens[0, 0, k, :n].tolist() for k, n in enumerate(ends)]
        for at, sharpening in enumerate((0.5, 1.0)):
            for name, after in (("with", thoughts), ("without", [[]])):
                wanted = by_hand(model, tokenizer, problem, after, words, sharpening)
                np.testing.assert_allclose(found[name][at, i], wanted, rtol=1e-4)


def test_a_new_head_gives_thoughts_no_weight(given):
    model, tokenizer, problems, _ = given
    found = answer_probability(model, tokenizer, problems, (0.7,), "head", seed=1, num_thoughts=2, thought_length=5)
    np.testing.assert_allclose(found["with"], found["without"], rtol=1e-5)


def test_the_best_sharpening_is_chosen_by_its_mean():
    assert fitted(np.array([[0.9, 0.1], [0.6, 0.6], [0.2, 0.7]])) == 1
