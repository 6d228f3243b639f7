"""Cross-entropy on replies: against a naive loop, stopped and resumed, and what learning the prompts is for."""

import pytest
import torch
from tiny import problems, tiny_champion

import qs_lib as qs
from qs_lib.data.strategies import reasoning_dataset
from qs_lib.data.tokens import add_thinking_tokens, encode_context, encode_reply
from qs_lib.training import imitation
from qs_lib.training.baking import prompted
from qs_lib.training.checkpoint import Checkpoint
from qs_lib.training.settings import BakingSettings

SETTINGS = BakingSettings(batch_size=4, prompt_epochs=2, muon=False, adamw_lr=1e-3)


@pytest.fixture
def given():
    lm, tokenizer = add_thinking_tokens(*tiny_champion())
    return lm, tokenizer, list(reasoning_dataset(problems(size=60), cot=6, per_strategy=1)["train"])


def test_the_loss_is_the_naive_one_of_each_reply_alone(given):
    lm, tokenizer, examples = given
    texts = [(encode_context(tokenizer, e["question"]), encode_reply(tokenizer, e["reply"])) for e in examples[:3]]
    naive = 0.0
    for context, reply in texts:
        logits = lm(torch.tensor([context + reply])).logits[0, len(context) - 1 : -1]
        naive += torch.nn.functional.cross_entropy(logits, torch.tensor(reply), reduction="sum")
    assert imitation._reply_loss(lm, texts, False).item() == pytest.approx(naive.item() / 3, rel=1e-5)


def test_prompts_are_learnt_only_if_asked(given):
    lm, tokenizer, examples = given
    texts = prompted([{**e, "fits": [e["strategy"]]} for e in examples], imitation.PROMPTS, "equation")
    assert all("( " in text for text in texts)
    before = {name: p.clone() for name, p in lm.named_parameters()}
    qs.learn_prompts(lm, tokenizer, examples, SETTINGS.but(prompt_epochs=0))
    assert all(p.equal(before[name]) for name, p in lm.named_parameters())
    rows = [
        (encode_context(tokenizer, c), encode_reply(tokenizer, e["reply"]))
        for c, e in zip(texts, examples, strict=True)
    ]
    loss = imitation._reply_loss(lm, rows, False).item()
    qs.learn_prompts(lm, tokenizer, examples, SETTINGS.but(privilege="equation", prompt_epochs=8, adamw_lr=5e-3))
    assert imitation._reply_loss(lm, rows, False).item() < 0.8 * loss


def test_a_stopped_imitation_goes_on_to_the_bit(given, tmp_path, monkeypatch):
    lm, tokenizer, examples = given
    start = {name: p.clone() for name, p in lm.state_dict().items()}
    qs.learn_prompts(lm, tokenizer, examples, SETTINGS)
    whole = {name: p.clone() for name, p in lm.state_dict().items()}
    lm.load_state_dict(start)
    real, calls = imitation.update, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(imitation, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        qs.learn_prompts(lm, tokenizer, examples, SETTINGS, checkpoint=Checkpoint(tmp_path, "x", seconds=0))
    lm.load_state_dict(start)
    qs.learn_prompts(lm, tokenizer, examples, SETTINGS, checkpoint=Checkpoint(tmp_path, "x", seconds=0))
    assert all(p.equal(whole[name]) for name, p in lm.state_dict().items())
    assert len(calls) < 4 + 8  # it did not begin anew


def test_layers_run_again_where_it_is_asked_and_train_the_same_weights(given, monkeypatch):
    lm, tokenizer, examples = given
    start, found = {name: p.clone() for name, p in lm.state_dict().items()}, []
    real, calls = torch.nn.Linear.forward, []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *args: calls.append(1) or real(*args))
    for again in (False, True):
        lm.load_state_dict(start)
        calls.clear()
        qs.learn_prompts(lm, tokenizer, examples, SETTINGS.but(gradient_checkpointing=again))
        found.append((len(calls), {name: p.clone() for name, p in lm.state_dict().items()}))
    (once, plain), (twice, same) = found
    assert 1.8 * once < twice < 2 * once  # all but the head
    assert all(p.equal(same[name]) for name, p in plain.items())


def test_the_epoch_that_scored_best_stays(given):
    lm, tokenizer, examples = given
    texts = [(encode_context(tokenizer, e["question"]), encode_reply(tokenizer, e["reply"])) for e in examples]
    scores, seen = iter([0.2, 0.5, 0.1]), []

    def score():
        seen.append(lm.lm_head.weight.detach().clone())
        return next(scores)

    assert imitation.imitate(lm, tokenizer, texts, SETTINGS.but(epochs=3), score) == [0.2, 0.5, 0.1]
    assert lm.lm_head.weight.equal(seen[1]) and not seen[1].equal(seen[2])
