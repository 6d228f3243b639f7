"""The mixing head fitted to a trained model's thoughts: nothing else moves, and the likelihood is the best there is."""

import pytest
import torch
from tiny import problems, tiny_quiet_star

from qs_lib.data import pocket
from qs_lib.training import heads, reinforce, watching

BUDGET = {"num_thoughts": 2, "thought_length": 6, "seed": 3}
TOLD = pocket.stories("train", 40)


def kept(monkeypatch):
    """The batches that a fit looks at, as it looks at them."""
    found, look = [], heads._looked_at
    monkeypatch.setattr(heads, "_looked_at", lambda *a: found.append(look(*a)) or found[-1])
    return found


@pytest.mark.parametrize("mixing", ("log_probs", "hidden"))
def test_only_the_head_moves_and_the_best_epoch_stays(mixing, monkeypatch):
    model, tokenizer = tiny_quiet_star(gate="place", mixing=mixing)
    before, seen = {n: w.clone() for n, w in model.state_dict().items()}, kept(monkeypatch)
    scores = heads.fit_mixing_head(model, tokenizer, problems(size=40), TOLD, 3, 4, 0.1, batch_size=8, **BUDGET)
    assert {n.split(".")[0] for n, w in model.state_dict().items() if not w.equal(before[n])} == {"mixing_head"}
    assert all(w.grad is None for w in model.lm.parameters())
    assert len(scores) == 5 and min(scores) < scores[0] - 0.01
    with torch.no_grad():
        again = [-(model.mix_truth(b)[b.valid]).mean().item() for b in seen[::10]]
    assert sum(again) / len(again) == pytest.approx(min(scores), abs=1e-5)
    assert {b.true.shape[2] for b in seen} == {3, 1} and {b.true.shape[1] for b in seen} == {1, 12}


def test_it_comes_to_the_best_weight_where_one_weight_is_all_there_is_to_learn(monkeypatch):
    """States without content leave the head a gate alone. Its place is that of a search over a thousand weights."""
    model, tokenizer = tiny_quiet_star(gate="place")
    look, seen = heads._looked_at, []

    def blank(*arguments):
        batch = look(*arguments)
        batch.base_hidden.zero_(), batch.thought_hidden.zero_()
        batch.true_logprobs.copy_(torch.where(torch.rand(batch.base_logprobs.shape) < 0.3, -0.1, -5.0).unsqueeze(2))
        batch.base_logprobs.fill_(-1.5)
        seen.append(batch)
        return batch

    monkeypatch.setattr(heads, "_looked_at", blank)
    torch.manual_seed(0)
    scores = heads.fit_mixing_head(model, tokenizer, (), TOLD, epochs=60, rate=0.01, batch_size=8, **BUDGET)
    thought = torch.cat([batch.true_logprobs[:, :, 0][batch.valid] for batch in seen]).exp()
    weights = torch.linspace(0, 1, 1001)
    surprise = [-((1 - g) * torch.tensor(-1.5).exp() + g * thought).log().mean().item() for g in weights.tolist()]
    best = weights[surprise.index(min(surprise))].item()
    gate = 1 - model.mixing_weights(seen[0])[..., 0].mean().item()
    assert 0.1 < best < 0.9 and gate == pytest.approx(best, abs=0.1) and scores[0] == pytest.approx(1.5)


def test_reinforcement_without_likelihood_ends_with_a_fitted_head(monkeypatch):
    """Meanwhile its thoughts are validated and shown all alike: with the shut gate no thought would count."""
    model, tokenizer = tiny_quiet_star(gate="place")
    weighed, true = [], watching.accuracy_with_thoughts
    monkeypatch.setattr(watching, "accuracy_with_thoughts", lambda *a, **k: weighed.append(a[3]) or true(*a, **k))
    given = {"steps": 1, "batch_size": 4, "num_thoughts": 2, "thought_length": 6, "nll_weight": 0.0}
    result = reinforce.train_quiet_star(model, tokenizer, problems(size=40), problems(size=4), **given)
    shown = [*result.watched, *result.episodes]
    assert len(shown) == 12 and all(e.no_thought_weight == 0 for e in shown)
    assert all({round(t.weight, 6) for t in e.thoughts} == {0.5} for e in shown)
    assert weighed == ["thoughts"] * 2 and model.mixing_head.gate.bias.item() != 0
