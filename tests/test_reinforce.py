import itertools
import math
import random
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import problems, tiny_quiet_star
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import qs_lib as qs
from qs_lib.champion import build_champion, build_tokenizer
from qs_lib.data import batches as c
from qs_lib.data.tokens import thinking_ids
from qs_lib.errors import ParameterError
from qs_lib.evaluation.episodes import Thought
from qs_lib.experiments.reinforcement import KeptAlone
from qs_lib.model import QuietStarForCausalLM
from qs_lib.thoughts.attention import recompute_layers
from qs_lib.thoughts.generate import generate_thoughts
from qs_lib.thoughts.rescore import rescore_thoughts
from qs_lib.training import reinforce as r
from qs_lib.training import watching
from qs_lib.training.checkpoint import Checkpoint
from qs_lib.training.loop import add_adapter
from qs_lib.training.settings import BakingSettings


def test_advantages_sum_to_zero_and_leave_one_out():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert r.advantages(rewards, "signed").tolist() == [[1 - 4.0, 2 - 3.5, 6 - 1.5]]
    assert r.advantages(torch.randn(5, 4), "signed").sum(-1).abs().max() < 1e-5
    assert r.advantages(rewards, "paper").tolist() == [[0.0, 0.0, 3.0]]
    assert r.advantages(rewards, "positive").tolist() == [[0.0, 0.0, 4.5]]


def test_expected_gradient_of_signed_and_positive_advantages():
    """A thought is right with probability p = sigmoid(x): over all outcomes of three thoughts, the signed gradient is
    dp/dx = p (1 - p), the positive one (1 - p) dp/dx."""
    p = 0.3
    expected = {"signed": 0.0, "positive": 0.0}
    for right in itertools.product((0.0, 1.0), repeat=3):
        probability = math.prod(p if x else 1 - p for x in right)
        slopes = torch.tensor([1 - p if x else -p for x in right])  # d log-prob / dx of each outcome
        for name in expected:
            expected[name] += probability * (r.advantages(torch.tensor(right), name) * slopes).mean().item()
    assert expected["signed"] == pytest.approx(p * (1 - p), rel=1e-5)
    assert expected["positive"] == pytest.approx((1 - p) * p * (1 - p), rel=1e-5)


def test_policy_gradient_on_paper():
    """Two one-token thoughts from softmax(theta) over 3 tokens; d loss / d theta = -mean_k A_k (onehot_k - p)."""
    theta = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    sampled = torch.tensor([0, 2])
    logprobs = theta.log_softmax(-1)[sampled].unsqueeze(-1)
    advantage = r.advantages(torch.tensor([1.0, 0.0]), "signed")
    assert advantage.tolist() == [1.0, -1.0]
    r.policy_gradient_loss(logprobs, advantage).backward()
    # -(1 * ([1,0,0] - 1/3) - 1 * ([0,0,1] - 1/3)) / 2 = [-1/2, 0, 1/2]
    assert theta.grad.tolist() == pytest.approx([-0.5, 0.0, 0.5], abs=1e-6)


def test_advantage_carries_no_gradient():
    reward = torch.tensor([1.0, 0.0], requires_grad=True)
    logprobs = torch.zeros(2, 1, requires_grad=True)
    r.policy_gradient_loss(logprobs, r.advantages(reward, "signed")).backward()
    assert reward.grad is None


def test_sampled_kl_is_zero_for_equal_policies_and_right_on_average():
    p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.6])
    assert r.sampled_kl(p.log()[None, :, None], p.log()[None, :, None]) == 0
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = r.sampled_kl(p.log()[drawn][:, None], q.log()[drawn][:, None])
    assert estimate.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=0.02)


def loss_of(model, reference, tokenizer, ids, mask, thoughts, **settings):
    return r.quiet_star_loss(model, reference, tokenizer, ids, mask, thoughts, r.QuietStarSettings(**settings))


def batch(model, tokenizer):
    ids, mask, positions = c.answer_batch(tokenizer, problems(size=6))
    generator = torch.Generator().manual_seed(0)
    return ids, mask, generate_thoughts(model.lm, ids, mask, positions, 3, 8, generator=generator)


def test_answer_batch_thinks_after_the_question_and_truth_follows():
    model, tokenizer = tiny_quiet_star()
    ids, _mask, positions = c.answer_batch(tokenizer, problems(size=6))
    truth = rescore_thoughts(model.lm, ids, batch(model, tokenizer)[2], n_true=3).true[:, 0]
    for row, p in enumerate(problems(size=6)):
        assert tokenizer.decode(ids[row, positions[row, 0]]) == "?"
        assert tokenizer.decode(truth[row]) == f"{p['answer']} . <eos>"


def test_nothing_but_the_named_parts_gives_gradient():
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    off = {"pg_weight": 0.0, "nll_weight": 0.0, "kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 3}
    loss, _, _ = loss_of(model, None, tokenizer, ids, mask, thoughts, **off)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    loss, _, _ = loss_of(model, None, tokenizer, ids, mask, thoughts, **off | {"pg_weight": 1.0})
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.lm.parameters())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.mixing_head.parameters())


def test_a_thought_alone_is_taught_though_the_gate_is_shut():
    """Its likelihood of the truth again from plain passes, later tokens at half weight; the shut gate lets none of it through."""
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    off = {"pg_weight": 0.0, "nll_weight": 0.0, "kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 3}
    loss, parts, _ = loss_of(model, None, tokenizer, ids, mask, thoughts, thought_nll_weight=2.0, **off)
    found = []
    for row in range(6):
        at = thoughts.positions[row, 0].item()
        text, truth = ids[row, : at + 1].tolist(), ids[row, at + 1 : at + 4].tolist()
        for k in range(3):
            said = thoughts.tokens[row, 0, k, : thoughts.lengths[row, 0, k]].tolist()
            with torch.no_grad():
                logits = model.lm(torch.tensor([text + said + truth])).logits[0, -len(truth) - 1 : -1].clone()
            logits[:, model.config.hidden_ids] = -torch.inf
            nll = -logits.log_softmax(-1).gather(1, torch.tensor(truth)[:, None]).squeeze(1)
            found.append((nll * torch.tensor([1.0, 0.5, 0.5])).sum().item())
    assert parts["no_thought_weight"] == 1.0 and parts["thought_nll"] == pytest.approx(sum(found) / 18, rel=1e-5)
    assert loss.item() == pytest.approx(2 * sum(found) / 18, rel=1e-5)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.lm.parameters())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.mixing_head.parameters())


def test_loss_parts_against_a_plain_recomputation(monkeypatch):
    """Reward and REINFORCE term again from plain forward passes over text + thought + truth, one thought at a time."""
    monkeypatch.setattr(r, "REWARD_FLOOR", -1e9)
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    only_pg = {"nll_weight": 0.0, "kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 3}
    loss, parts, _ = loss_of(model, None, tokenizer, ids, mask, thoughts, objective="signed", **only_pg)
    hidden, rewards, logprobs = model.config.hidden_ids, torch.zeros(6, 3), torch.zeros(6, 3)

    def score(text, continuation, forbid):
        logits = model.lm(torch.tensor([text + continuation])).logits[0, len(text) - 1 : -1].clone()
        logits[:, forbid] = -torch.inf
        return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()

    for row in range(6):
        at = thoughts.positions[row, 0].item()
        text, truth = ids[row, : at + 1].tolist(), ids[row, at + 1 : at + 4].tolist()
        for k in range(3):
            n = thoughts.lengths[row, 0, k].item()
            thought = thoughts.tokens[row, 0, k, :n].tolist()
            rewards[row, k] = score(text + thought, truth, hidden) - score(text, truth, hidden)
            chosen = thought[1:] if thoughts.sampled[row, 0, k, n - 1] else thought[1:-1]
            logprobs[row, k] = score(text + thought[:1], chosen, [thoughts.think_id])
    assert parts["reward"] == pytest.approx(rewards.mean().item(), abs=1e-4)
    expected = -(r.advantages(rewards, "signed") * logprobs).mean().item()
    assert loss.item() == pytest.approx(expected, abs=1e-3)


def test_the_gradient_is_that_of_all_thoughts_though_only_those_with_an_advantage_are_read_for_it():
    """The gradient again from a plain forward pass over each text and thought, those without an advantage too."""
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    only_pg = {"nll_weight": 0.0, "kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 3, "objective": "positive"}
    loss, _, (_, advantage) = loss_of(model, None, tokenizer, ids, mask, thoughts, **only_pg)
    read = r.credited(model.lm, ids, mask, thoughts, advantage).thought_logprobs
    assert 0 < (advantage > 0).sum() < advantage.numel()
    assert torch.equal(read[:, 0].sum(-1) != 0, advantage > 0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.lm.named_parameters()}
    model.zero_grad()
    expected = 0.0
    for row, k in itertools.product(range(6), range(3)):
        text, n = ids[row, : thoughts.positions[row, 0] + 1].tolist(), thoughts.lengths[row, 0, k].item()
        said = thoughts.tokens[row, 0, k, :n].tolist()
        logits = model.lm(torch.tensor([text + said])).logits[0, len(text) : -1]
        logits = logits.index_fill(1, torch.tensor([thoughts.think_id]), -torch.inf)
        each = logits.log_softmax(-1).gather(1, torch.tensor(said[1:])[:, None]).squeeze(1)
        expected = expected - advantage[row, k] * (each * thoughts.sampled[row, 0, k, 1:n]).sum() / 18
    expected.backward()
    for name, p in model.lm.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-5), name


def test_reward_alone_judges_alike_without_a_vocabulary_for_each_true_token(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    forbid = tuple(thinking_ids(tokenizer))
    said = r.rescore_thoughts(model.lm, ids, thoughts, mask, 1, forbid, True).true_full[:, 0, 0, 0].argmax(-1)
    ids[torch.arange(len(ids)), thoughts.positions[:, 0] + 1] = said  # the first thought of each is right
    asked, real = [], r.rescore_thoughts
    monkeypatch.setattr(
        r, "rescore_thoughts", lambda *x, **k: asked.append(k.get("true_logits", False)) or real(*x, **k)
    )
    given = {"kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 1, "reward": "correct"}
    rewards = [loss_of(model, None, tokenizer, ids, mask, thoughts, nll_weight=w, **given)[2][0] for w in (0.0, 1.0)]
    assert asked == [False, False, True]  # alone: all thoughts, and those with an advantage again
    assert torch.equal(*rewards) and 0 < rewards[0].mean() < 1


def test_without_any_advantage_all_thoughts_are_read_and_move_nothing():
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    read = r.credited(model.lm, ids, mask, thoughts, torch.zeros(6, 3)).thought_logprobs
    assert torch.allclose(read, rescore_thoughts(model.lm, ids, thoughts, mask).thought_logprobs, atol=1e-6)


@pytest.mark.parametrize("mixing", ["log_probs", "hidden"])
def test_the_head_learns_from_what_was_left_out_as_it_does_from_what_was_kept(mixing):
    """Its gradient is that of the whole loss's likelihood term, and no other weight has any."""
    model, tokenizer = tiny_quiet_star(mixing=mixing)
    ids, mask, thoughts = batch(model, tokenizer)
    only = {"pg_weight": 0.0, "kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 3, "look_ahead_weight": 0.3}
    loss, parts, _ = loss_of(model, None, tokenizer, ids, mask, thoughts, nll_weight=1.0, **only)
    loss.backward()
    wanted = [p.grad.clone() for p in model.mixing_head.parameters()]
    model.zero_grad()
    nll = r.head_nll(model, tokenizer, ids, mask, thoughts, r.QuietStarSettings(**only))
    nll.backward()
    assert nll.item() == pytest.approx(parts["nll"], abs=1e-6)
    assert any(grad.abs().max() > 0 for grad in wanted)
    for p, grad in zip(model.mixing_head.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-7)
    assert all(p.grad is None for p in [*model.lm.parameters(), *model.gain_head.parameters()])


@pytest.mark.parametrize("part", ["kept", "left out"])
def test_one_problem_does_not_drown_the_others(part):
    """A gate that is open before thoughts that make the truth impossible: its slope is in the thousands, and is cut."""
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    only = {"pg_weight": 0.0, "kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 3, "nll_weight": 1.0}
    found, real = {}, model.mix_truth

    def hopeless(scored, weights):
        scored.true_logprobs = scored.true_logprobs.detach().index_fill(0, torch.tensor([0]), -20.0)
        open_gate = torch.nn.functional.pad(torch.full_like(weights[..., 1:], 0.5), (1, 0))
        return real(scored, weights + (open_gate - weights).detach())

    model.mix_truth = hopeless
    for steepest in (100.0, 1e30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(r, "STEEPEST", steepest)
            model.zero_grad()
            if part == "kept":
                loss_of(model, None, tokenizer, ids, mask, thoughts, **only)[0].backward()
            else:
                r.head_nll(model, tokenizer, ids, mask, thoughts, r.QuietStarSettings(**only)).backward()
        found[steepest] = sum(p.grad.norm() for p in model.mixing_head.parameters()).item()
    assert found[1e30] > 100 * found[100.0] > 0


@pytest.mark.parametrize("problems", [1, 8])
def test_slopes_are_cut_by_problem_and_keep_their_direction(problems):
    """By hand: (30, 40) has a norm of 50 and stays, (600, 800) has 1,000 and is cut to 100. Each counts 1 / problems."""
    slopes = torch.tensor([[30.0, 40.0], [600.0, 800.0], [0.0, 0.0]])[:, None, None] / problems
    wanted = torch.tensor([[30.0, 40.0], [60.0, 80.0], [0.0, 0.0]])[:, None, None] / problems
    assert torch.allclose(r.cut(slopes, problems), wanted)


def test_every_drawn_problem_is_kept_or_left_out():
    """By hand: of groups of 1, 3, 2, 1, 2 and 3 answers the four with most are kept, in their order."""
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    answers = torch.tensor([[5, 5, 5], [5, 6, 7], [5, 5, 6], [6, 6, 6], [7, 6, 7], [7, 6, 5]])
    thoughts = replace(thoughts, tokens=answers[:, None, :, None].expand_as(thoughts.tokens))
    drawn = r.Rollouts([{"id": name} for name in "uvwxyz"], ids, mask, thoughts)
    kept, left, answered = r.keep_disputed(drawn, r.QuietStarSettings(batch_size=4, over=2), torch.Generator())
    assert ["".join(p["id"] for p in part.problems) for part in (kept, left)] == ["vwyz", "ux"]
    assert torch.equal(left.ids, ids[[0, 3]]) and answered == 2
    kept, left, _ = r.keep_disputed(drawn, r.QuietStarSettings(batch_size=6, over=1), torch.Generator())
    assert kept.problems == drawn.problems and left.problems == []


def test_problems_left_out_train_the_head_and_nothing_else():
    seen = {}
    for settings in (KeptAlone, r.QuietStarSettings):
        model, tokenizer = tiny_quiet_star()
        few = {"steps": 1, "batch_size": 2, "over": 3, "num_thoughts": 2, "thought_length": 6, "n_true": 3}
        qs.train_quiet_star(model, tokenizer, problems(), problems(size=4), settings(**few))
        seen[settings] = model
    kept, drawn = seen.values()
    assert all(torch.equal(*pair) for pair in zip(kept.lm.parameters(), drawn.lm.parameters(), strict=True))
    heads = zip(kept.mixing_head.parameters(), drawn.mixing_head.parameters(), strict=True)
    assert not all(torch.equal(*pair) for pair in heads)


def test_kl_to_itself_is_zero():
    import copy

    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    _, parts, _ = loss_of(model, copy.deepcopy(model.lm), tokenizer, ids, mask, thoughts, n_true=3)
    assert all(parts[name] == pytest.approx(0, abs=1e-6) for name in ("kl", "base_kl", "habit_kl"))


def test_habit_kl_sees_a_model_that_no_longer_begins_to_think():
    """The plain distribution after the question, recomputed row by row; the direct answers' KL is blind to it."""
    import copy

    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    reference = copy.deepcopy(model.lm)
    with torch.no_grad():
        head = model.lm.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())  # untied: only the output changes
        head.weight[thoughts.think_id] *= -3
    _, parts, _ = loss_of(model, reference, tokenizer, ids, mask, thoughts, n_true=3)
    at = thoughts.positions[:, 0]
    true, mine = (
        lm(ids, attention_mask=mask).logits[torch.arange(6), at].log_softmax(-1) for lm in (reference, model.lm)
    )
    expected = (true.exp() * (true - mine)).sum(-1).mean().item()
    assert expected > 1e-3 and parts["habit_kl"] == pytest.approx(expected, abs=1e-4)
    assert parts["base_kl"] == pytest.approx(0, abs=1e-6)


def test_training_repeats_itself_and_keeps_the_best_weights():
    runs = []
    for _ in range(2):
        model, tokenizer = tiny_quiet_star()
        lines = []
        result = r.train_quiet_star(
            model,
            tokenizer,
            problems(size=24),
            problems("validation", 6),
            steps=3,
            batch_size=4,
            num_thoughts=3,
            thought_length=8,
            evaluate_every=1,
            n_true=3,
            checkpoint=Checkpoint(log=lambda lines=lines, **m: lines.append(m)),
        )
        seen = [result.start_validation, *(m["validation_accuracy"] for m in lines)]
        assert result.best_validation == max(seen)
        runs.append((lines, model.state_dict()))
    for line in (line for lines, _ in runs for line in lines):
        assert line.pop("seconds") > 0  # need not repeat itself
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True))


def test_a_training_that_only_does_harm_keeps_the_start():
    model, tokenizer = tiny_quiet_star()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = {"batch_size": 4, "num_thoughts": 2, "thought_length": 8, "evaluate_every": 1, "think_at": "random"}
    held = problems("validation", 4)
    result = r.train_quiet_star(model, tokenizer, problems(size=24), held, steps=2, adamw_lr=3.0, **small)
    assert result.best_step == 0 and result.best_validation == result.start_validation
    assert all(line["validation_log_likelihood"] < result.start_validation for line in result.history)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_curriculum_goes_from_easy_to_hard():
    pool = [{"difficulty": d} for d in (1, 2, 3) for _ in range(5)]
    rng = random.Random(0)
    assert {p["difficulty"] for p in c.curriculum(pool, 0.0, rng, 40)} == {1}
    assert {p["difficulty"] for p in c.curriculum(pool, 0.05, rng, 40)} == {1, 2}
    late = [p["difficulty"] for p in c.curriculum(pool, 1.0, rng, 40, 0.5)]
    assert set(late) == {1, 2, 3} and late.count(3) >= 20


def test_bad_input_is_one_sentence():
    model, tokenizer = tiny_quiet_star()
    with pytest.raises(ValueError, match="at least one training and one validation problem"):
        r.train_quiet_star(model, tokenizer, [], problems())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match="lower the learning rates"):
        patch.setattr(r, "quiet_star_loss", lambda *a, **k: (torch.tensor(float("nan"), requires_grad=True), {}, ()))
        r.train_quiet_star(
            model,
            tokenizer,
            problems(),
            problems("validation"),
            steps=1,
            batch_size=4,
            num_thoughts=2,
            thought_length=6,
        )


def test_the_paper_scores_thoughts_at_its_own_temperature(monkeypatch):
    """Positive advantage x log-probs at temperature 3, again from the logits after text + thought so far."""
    monkeypatch.setattr(r, "REWARD_FLOOR", -1e9)
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    only_pg = {"nll_weight": 0.0, "kl_coefficient": 0.0, "base_kl": 0.0, "n_true": 3}
    loss, _, _ = loss_of(model, None, tokenizer, ids, mask, thoughts, objective="paper", **only_pg)
    scored = rescore_thoughts(model.lm, ids, thoughts, mask, n_true=3, forbid_true=tuple(model.config.hidden_ids))
    rewards = (scored.true_logprobs - scored.base_logprobs.unsqueeze(2)).sum(-1)
    expected = 0.0
    for row, k in itertools.product(range(6), range(3)):
        text = ids[row, : thoughts.positions[row, 0] + 1].tolist()
        n = thoughts.lengths[row, 0, k].item()
        thought = thoughts.tokens[row, 0, k, :n].tolist()
        logits = model.lm(torch.tensor([text + thought])).logits[0, len(text) :] / 3
        logits[:, thoughts.think_id] = -torch.inf
        chosen = thought[1:] if thoughts.sampled[row, 0, k, n - 1] else thought[1:-1]
        summed = sum(logits[i].log_softmax(-1)[token].item() for i, token in enumerate(chosen))
        expected -= r.advantages(rewards, "paper")[row, 0, k].item() * summed / 18
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_positions_without_thoughts_count_nothing():
    """Thoughts at two places of each row and at one more that is none: loss and parts are those of the two."""
    model, tokenizer = tiny_quiet_star()
    ids, mask = c.think_where(model.lm, tokenizer, problems(size=4), "every")[:2]
    two = torch.tensor([[3, 6]] * 4)
    three = torch.cat([two, torch.full((4, 1), -1)], 1)
    found = []
    for at in (two, three):
        generator = torch.Generator().manual_seed(0)
        thoughts = generate_thoughts(model.lm, ids, mask, at, 2, 6, generator=generator)
        found.append(loss_of(model, model.lm, tokenizer, ids, mask, thoughts, n_true=2))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_where_to_think():
    model, tokenizer = tiny_quiet_star()
    few = problems(size=5)
    ids, mask, at = c.think_where(model.lm, tokenizer, few)
    assert torch.equal(at, c.answer_batch(tokenizer, few)[2])
    ids, mask, at = c.think_where(model.lm, tokenizer, few, "every")
    assert at is None and tokenizer.decode(ids[0, : mask[0].sum()]).startswith(f"<bos> {few[0]['question']} think ")
    with torch.no_grad():
        predicted = model.lm(ids).logits[:, :-1].log_softmax(-1)
    hardness = {
        "difficult": -predicted.gather(2, ids[:, 1:, None]).squeeze(2),
        "uncertain": -(predicted.exp() * predicted).sum(-1),
    }
    for where, values in hardness.items():
        ids, mask, at = c.think_where(model.lm, tokenizer, few, where, 3)
        for row in range(5):
            real = values[row, : mask[row].sum() - 1]
            assert sorted(at[row].tolist()) == sorted(real.topk(3).indices.tolist())
    drawn = torch.zeros(mask.shape, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids, mask, at = c.think_where(model.lm, tokenizer, few, "random", 3, generator)
        assert all(len(set(row)) == 3 for row in at.tolist())
        drawn.scatter_add_(1, at, torch.ones_like(at))
    lengths = mask.sum(1)
    for row, n in zip(
        drawn, lengths.tolist(), strict=True
    ):  # every token that another follows, each as often as any other
        share = row[: n - 1] / (200 * 3 / (n - 1))
        assert share.min() > 0.4 and share.max() < 1.8 and row[n - 1 :].sum() == 0
    assert (c.think_where(model.lm, tokenizer, few, "random", 500, generator)[2] >= 0).sum(1).tolist() == (
        lengths - 1
    ).tolist()
    with pytest.raises(ValueError, match="think at 'here'"):
        c.think_where(model.lm, tokenizer, few, "here")


@pytest.mark.parametrize(
    "settings",
    [
        {"think_at": "difficult", "num_positions": 2},
        {"think_at": "random", "num_positions": 2},
        {"think_at": "every"},
        {"adaptive_length": True},
    ],
)
def test_options_train_and_say_what_they_did(settings):
    model, tokenizer = tiny_quiet_star()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = r.train_quiet_star(
        model,
        tokenizer,
        problems(size=24),
        problems("validation", 4),
        steps=2,
        batch_size=3,
        num_thoughts=2,
        thought_length=16,
        n_true=2,
        evaluate_every=1,
        **settings,
    )
    last = result.history[-1]
    name = "validation_log_likelihood" if "think_at" in settings else "validation_accuracy"
    assert math.isfinite(last[name]) and last["max_logit"] > 0 and last["diversity"] >= 1
    assert result.best_validation == max(result.start_validation, *(h[name] for h in result.history))
    if "adaptive_length" in settings:
        longest = max(len(tokenizer.encode(p["question"])) for p in problems(size=24)) + 4
        assert last["length"] <= max(10, longest // 5) + 1
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_tensorboard_gets_what_the_log_gets(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from qs_lib.workbook.tracking import tensorboard

    lines = []
    assert tensorboard(print, tmp_path) is print  # not asked for
    monkeypatch.setenv("QS_TENSORBOARD", "1")
    log = tensorboard(lambda **m: lines.append(m), tmp_path)
    log(step=1, reward=0.5, note="text")
    log(step=3, reward=1.5)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (3, 1.5)]
    assert len(lines) == 2 and lines[0]["note"] == "text"


def test_without_tensorboard_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    import sys

    from qs_lib.errors import WorkbookError
    from qs_lib.workbook.tracking import tensorboard

    monkeypatch.setenv("QS_TENSORBOARD", "1")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(WorkbookError, match="pip install tensorboard"):
        tensorboard(print, tmp_path)


def test_trackio_gets_what_the_log_gets_and_episodes_as_traces(monkeypatch):
    """What trackio 0.43 was seen to take: ``init(project, name)``, ``Run.log(metrics, step)``, ``Trace(messages, metadata)``."""
    import sys
    from types import SimpleNamespace

    from qs_lib.workbook.tracking import trackio

    lines, told = [], []
    run = SimpleNamespace(log=lambda metrics, step: told.append((step, metrics)), finish=lambda: told.append("end"))
    fake = SimpleNamespace(init=lambda project, name, embed: run, Trace=lambda messages, about: (messages, about))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert trackio(print, "05_rl")[0] is print, "tracked only if asked"
    monkeypatch.setenv("QS_TRACKIO", "project")
    log, finish = trackio(lambda **m: lines.append(m), "05_rl")
    log(step=1, reward=0.5)
    thought = Thought(tokens=["<think>", " 3", "</think>"], logprobs=[0.0] * 3)
    common = {"problem": 2, "question": "q", "answer": "7", "position": 0, "tokens": ["q"], "thoughts": [thought]}
    finish([qs.Episode(**common, step=4, answer_with="3")])
    assert lines == [{"step": 1, "reward": 0.5}]
    texts = [("user", "q"), ("assistant", "<think> 3</think>"), ("assistant", "3")]
    trace = [{"role": role, "content": text} for role, text in texts], {"answer": "7"}
    assert told == [(1, {"reward": 0.5}), (4, {"problem 2": trace}), "end"]


def test_without_trackio_one_sentence_says_how_to_get_it(monkeypatch):
    import sys

    from qs_lib.errors import WorkbookError
    from qs_lib.workbook.tracking import trackio

    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setenv("QS_TRACKIO", "project")
    with pytest.raises(WorkbookError, match="pip install trackio"):
        trackio(print, "05_rl")


@pytest.mark.parametrize("tied", [True, False])
def test_lora_training_moves_hidden_matrices_eight_rows_and_the_head(tmp_path, tied):
    pytest.importorskip("peft")
    model, tokenizer = tiny_quiet_star()
    if not tied:
        model.lm.get_output_embeddings().weight = torch.nn.Parameter(
            model.lm.get_input_embeddings().weight.detach().clone()
        )
        model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen, settings = (
        [],
        {"steps": 2, "batch_size": 4, "num_thoughts": 3, "thought_length": 8, "evaluate_every": 1, "n_true": 3},
    )
    make = r.MuonGrokfast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r, "MuonGrokfast", lambda *a, **k: seen.append(make(*a, **k)) or seen[-1])
        result = r.train_quiet_star(
            model, tokenizer, problems(size=24), problems("validation", 6), lora_rank=2, token_scale=10.0, **settings
        )
    groups = {group["name"]: group["param_names"] for group in seen[0].param_groups}
    assert all("lora_B" in name or "mixing_head" in name for name in groups["muon"])
    assert groups["tokens"] and all("trainable_tokens_delta" in name for name in groups["tokens"])
    after, rows = model.state_dict(), set(thinking_ids(tokenizer))
    assert (
        after.keys() == before.keys() and len(result.history) == 2 and all(p.requires_grad for p in model.parameters())
    )
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("q_proj" in name for name in moved) and any("mixing_head" in name for name in moved)
    assert not any("norm" in name for name in moved)
    for name in ("lm.model.embed_tokens.weight", "lm.lm_head.weight"):
        changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
        assert changed and set(changed) <= rows
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())


def test_the_reference_of_an_adapter_is_the_model_without_it():
    import copy

    pytest.importorskip("peft")
    model, tokenizer = tiny_quiet_star()
    ids, mask, thoughts = batch(model, tokenizer)
    frozen, adapter = copy.deepcopy(model.lm), add_adapter(model.lm, tokenizer, 2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    losses = [loss_of(model, reference, tokenizer, ids, mask, thoughts, n_true=3) for reference in (frozen, adapter)]
    assert losses[0][1] == losses[1][1] and losses[0][0].item() == losses[1][0].item()
    assert min(losses[0][1][name] for name in ("kl", "base_kl", "habit_kl")) > 1e-4


def stopped_after(step, folder) -> Checkpoint:
    """A checkpoint in a folder whose training is interrupted after a step, or runs through if that is None."""

    def log(**metrics):
        if metrics["step"] == step:
            raise InterruptedError

    saving = Checkpoint(folder, {}, seconds=0)
    saving._log = log
    return saving


def test_lora_training_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("peft")
    settings = {
        "steps": 4,
        "batch_size": 4,
        "num_thoughts": 3,
        "thought_length": 8,
        "evaluate_every": 2,
        "n_true": 3,
        "lora_rank": 2,
    }
    states = []
    for stop in (None, 3, None):
        model, tokenizer = tiny_quiet_star()
        torch.manual_seed(1)
        saving = stopped_after(stop, tmp_path if stop or states else None)
        try:
            r.train_quiet_star(
                model, tokenizer, problems(size=24), problems("validation", 6), checkpoint=saving, **settings
            )
            states.append(model.state_dict())
        except InterruptedError:
            assert stop and any(tmp_path.iterdir())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_heads_above_the_threshold_are_clipped_in_training():
    settings = {"steps": 2, "batch_size": 4, "num_thoughts": 3, "thought_length": 8, "evaluate_every": 2, "n_true": 3}
    largest = {}
    for threshold in (0.0, 0.05):
        model, tokenizer = tiny_quiet_star()
        result = r.train_quiet_star(
            model, tokenizer, problems(size=24), problems("validation", 6), qk_clip_threshold=threshold, **settings
        )
        largest[threshold] = result.history[-1]["max_logit"]
    assert largest[0.05] < 0.1 < largest[0.0]


@pytest.mark.parametrize("where", ["question", "difficult"])
def test_groups_that_were_trained_on_are_kept_as_episodes(where):
    """Before the first step the model is the one that was given: reward and advantage again from its own scores."""
    model, tokenizer = tiny_quiet_star()
    fresh = tiny_quiet_star()[0]
    pool = problems(size=24)
    result = r.train_quiet_star(
        model,
        tokenizer,
        pool,
        problems("validation", 6),
        steps=2,
        batch_size=4,
        num_thoughts=3,
        thought_length=8,
        evaluate_every=1,
        n_true=2,
        think_at=where,
        objective="signed",
    )
    assert [e.stage for e in result.episodes] == ["step 1"] * 4 + ["step 2"] * 4
    assert all(len(e.thoughts) == 3 and e.question in {p["question"] for p in pool} for e in result.episodes)
    for e in result.episodes[:4]:
        ids = tokenizer.convert_tokens_to_ids([t for t in e.tokens])
        rewards = torch.tensor([t.reward for t in e.thoughts])
        assert rewards.tolist() == pytest.approx([max(t.utility, -6.0) for t in e.thoughts], abs=1e-4)
        assert [t.advantage for t in e.thoughts] == pytest.approx(r.advantages(rewards, "signed").tolist(), abs=1e-4)
        assert e.base_tokens[0][1] == pytest.approx(likeliest(fresh, tokenizer, e.tokens), abs=1e-3)
        assert (e.position, len(ids)) == (len(e.tokens) - 1, len(e.tokens))
    answers = {p["question"]: p["answer"] for p in pool}
    if where == "question":
        assert all(e.answer == answers[e.question] for e in result.episodes)
    assert all(e.answer_with and e.answer_without for e in result.episodes)


def likeliest(model, tokenizer, tokens) -> float:
    logits = model.lm(torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])).logits[0, -1].clone()
    logits[model.config.hidden_ids] = -torch.inf
    return logits.softmax(-1).max().item()


def trained_with(**settings):
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.5)
    result = r.train_quiet_star(
        model,
        tokenizer,
        problems(size=24),
        problems("validation", 6),
        steps=3,
        batch_size=4,
        num_thoughts=3,
        thought_length=8,
        evaluate_every=3,
        n_true=2,
        **settings,
    )
    return model.state_dict(), result.history


def test_running_layers_again_trains_the_same_weights_to_the_bit():
    (plain, history), (again, other) = trained_with(), trained_with(gradient_checkpointing=True)
    assert history == other and all(torch.equal(again[name], value) for name, value in plain.items())


def test_autocast_draws_and_scores_in_bfloat16_and_keeps_float32_weights(monkeypatch):
    kinds = []
    monkeypatch.setattr(
        r,
        "generate_thoughts",
        lambda *a, real=r.generate_thoughts, **k: kinds.append(torch.is_autocast_enabled("cpu")) or real(*a, **k),
    )
    monkeypatch.setattr(
        r,
        "quiet_star_loss",
        lambda *a, real=r.quiet_star_loss, **k: kinds.append(torch.is_autocast_enabled("cpu")) or real(*a, **k),
    )
    found, history = trained_with(bf16=True)
    assert kinds == [True] * 6 and all(math.isfinite(row["loss"]) for row in history)
    assert all(value.dtype == torch.float32 for value in found.values())
    plain, _ = trained_with()
    moved = max((found[n] - plain[n]).abs().max().item() for n in plain)
    assert 0 < moved < 0.05


# What an answer is, and what is left behind -------------------------------------------------------------------------


def bare_space_tokenizer():
    """As in Llama-2's ``tokenizer.json``: a bare space comes before a number."""
    alphabet = {c: i for i, c in enumerate(["<unk>", "<pad>", "<bos>", "<eos>", "▁", *"0123456789.-/,?abcdefgh"])}
    raw = Tokenizer(models.BPE(alphabet, [], unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def answered(tokenizer, answers, n_true, **settings):
    """How many of the next tokens are judged after each answer's question."""
    ids, mask, positions = c.answer_batch(tokenizer, [{"question": "a ?", "answer": a} for a in answers])
    judged = r.judged_tokens(tokenizer, ids, mask, positions, r.QuietStarSettings(n_true=n_true, **settings))
    assert (judged.int().diff(dim=-1) <= 0).all()
    return judged.sum(-1).flatten().tolist()


def test_all_tokens_of_the_answer_are_judged_and_its_stop_is_not():
    assert answered(build_tokenizer("pocket", []), ["7", "16", "100"], 4) == [1, 1, 1]
    byte_level = build_tokenizer("own", ["a 0 1 2 3 4 5 6 7 8 9 ."] * 3, 300, byte_level=True)
    assert answered(byte_level, ["7", "16", "160", "3.5", "1/2"], 8) == [1, 2, 3, 3, 3]
    assert answered(bare_space_tokenizer(), ["7", "16", "1,600", "3.5"], 8) == [2, 3, 6, 4]
    assert answered(bare_space_tokenizer(), ["7", "16", "1,600", "3.5"], 3) == [2, 3, 3, 3]
    assert answered(bare_space_tokenizer(), ["7", "1,600"], 8, think_at="random") == [1, 1]


@pytest.mark.parametrize("kind", ["byte level", "bare space"])
def test_an_answer_is_right_if_all_its_tokens_are_the_likeliest(monkeypatch, kind):
    tokenizer = bare_space_tokenizer() if kind == "bare space" else build_tokenizer("own", ["a 1 1 1 ."], 300, True)
    lm = build_champion(tokenizer, hidden_size=32, heads=2, intermediate_size=48).eval()
    model = QuietStarForCausalLM.from_base(*qs.add_thinking_tokens(lm, tokenizer))
    ids, mask, positions = c.answer_batch(tokenizer, [{"question": "a ?", "answer": "16"}] * 2)
    length = {"bare space": 3, "byte level": 2}[kind]
    thoughts = generate_thoughts(model.lm, ids, mask, positions, 4, 6, generator=torch.Generator().manual_seed(0))

    def planted(*given, **options):
        """As many true tokens in a row as a thought's number says are the likeliest."""
        scored = rescore_thoughts(*given, **options)
        best = scored.true_full.detach().clone().fill_(-1.0)
        for k, right in enumerate((length, length - 1, length + 1, 0)):
            true = scored.true[:, :, :, None]
            best[:, :, k].scatter_(-1, true, torch.where(torch.arange(6) < right, 0.0, -2.0)[:, None].expand_as(true))
        scored.true_full = best
        return scored

    monkeypatch.setattr(r, "rescore_thoughts", planted)
    settings = {"n_true": 6, "reward": "correct", "kl_coefficient": 0.0, "base_kl": 0.0}
    _, parts, (rewards, _) = loss_of(model, None, tokenizer, ids, mask, thoughts, **settings)
    assert rewards.tolist() == [[1.0, 0.0, 1.0, 0.0]] * 2 and parts["correct"] == 0.5 and parts["tied"] == 0.0


FEW = {"steps": 2, "batch_size": 2, "num_thoughts": 2, "thought_length": 6, "evaluate_every": 2}


def with_dropout():
    torch.manual_seed(0)
    tokenizer = build_tokenizer("pocket", [])
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    lm = AutoModelForCausalLM.from_config(config).eval()
    return QuietStarForCausalLM.from_base(*qs.add_thinking_tokens(lm, tokenizer)), tokenizer


def standing(model):
    """All of a model but its weights: modules, modes, hooks, flags, and attributes that other modules lack."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = {n: (type(m), m.training, [len(vars(m)[h]) for h in names]) for n, m in model.named_modules()}
    own = {
        n: {a for a in vars(m) if "checkpointing" not in a and "require_grads" not in a}
        for n, m in model.named_modules()
    }
    recomputed = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    return modules, own, recomputed, {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_rank": 2},
        {"lora_rank": 1, "kl_coefficient": 0.0, "base_kl": 0.0},
        {"lora_rank": 2, "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "think_at": "random", "num_positions": 2},
    ],
)
@pytest.mark.parametrize("given", ["plain", "partly frozen", "recomputed"])
@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_a_model_as_a_fresh_one_stands(settings, given, fails, monkeypatch):
    if "lora_rank" in settings:
        pytest.importorskip("peft")
    model, tokenizer = with_dropout()
    model.lm.transformer.wpe.requires_grad_(given != "partly frozen")
    if given == "recomputed":
        recompute_layers(model.lm)
    before, weights = standing(model), {n: v.clone() for n, v in model.state_dict().items()}
    train = partial(r.train_quiet_star, model, tokenizer, problems(size=12), problems("validation", 3))
    if fails:
        monkeypatch.setattr(r, "validate", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(**FEW | settings)
    else:
        train(**FEW | settings)
    assert standing(model) == before
    if "lora_rank" in settings and fails:  # the adapter was taken off
        same = {n: torch.equal(v, weights[n]) for n, v in model.state_dict().items() if n.startswith("lm.")}
        assert all(same.values())
    ids = torch.tensor([tokenizer.encode("ben has 9 pens . how many pens ?")])
    fresh = with_dropout()[0]
    fresh.load_state_dict(model.state_dict())
    passes = [one(ids, think=False).logits for one in (model, model, fresh)]
    assert torch.equal(passes[0], passes[1]) and torch.equal(passes[0], passes[2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_thoughts": 1}, "num_thoughts=1: input should be greater than or equal to 2"),
        ({"num_thoughts": 0}, "num_thoughts=0"),
        ({"temperature": 0.0}, "temperature=0.0: input should be greater than 0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"thought_length": 2}, "thought_length=2"),
        ({"muon_lr": 0.0, "adamw_lr": 0.0}, "both 0: nothing would be trained"),
        ({"pg_weight": 0.0, "nll_weight": 0.0}, "all 0: nothing would be trained"),
        ({"num_thought": 2}, "did you mean num_thoughts"),
        ({"settings": BakingSettings()}, "must be a QuietStarSettings"),
        ({"settings": {"steps": 1}}, "must be a QuietStarSettings"),
        *[({name: 0}, f"{name}=0") for name in ("steps", "batch_size", "n_true", "over", "num_positions")],
        *[({name: -1}, f"{name}=-1") for name in ("evaluate_every", "lora_rank", "qk_clip_threshold", "seed")],
    ],
)
def test_what_can_never_train_is_refused_before_anything_moves(settings, words):
    model, tokenizer = tiny_quiet_star()
    before = standing(model)
    with pytest.raises(ParameterError, match=words):
        r.train_quiet_star(model, tokenizer, problems(), problems("validation", 2), **settings)
    assert standing(model) == before


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-9}, {"reward": "correct"}, {"thought_length": 3, "temperature": 1e-6}]
)
def test_groups_that_never_differ_are_told(settings):
    model, tokenizer = tiny_quiet_star()
    with pytest.warns(UserWarning, match="no thoughts differed in reward in 2 steps up to step 2"):
        result = r.train_quiet_star(model, tokenizer, problems(), problems("validation", 2), **FEW | settings)
    assert [row["tied"] for row in result.history] == [1.0, 1.0]


def test_groups_that_differ_are_silent():
    model, tokenizer = tiny_quiet_star()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = r.train_quiet_star(model, tokenizer, problems(), problems("validation", 2), **FEW)
    assert min(row["tied"] for row in result.history) < 1


SHORT = {"steps": 5, "batch_size": 4, "num_thoughts": 3, "thought_length": 8, "evaluate_every": 2, "n_true": 3}


@pytest.mark.parametrize("where", ["question", "random"])
def test_watching_held_out_problems_changes_no_bit_of_the_training(where, monkeypatch):
    runs = []
    for watched in (True, False):
        with monkeypatch.context() as patch:
            if not watched:
                patch.setattr(r, "watch", lambda *_: [])
            torch.manual_seed(0)
            model, tokenizer = tiny_quiet_star()
            train, held_out = problems(size=24), problems("validation", 6)
            result = r.train_quiet_star(model, tokenizer, train, held_out, think_at=where, **SHORT)
        after = [torch.rand(1).item(), random.random()]
        random.seed(0)
        runs.append((result, model.state_dict(), after))
    (seen, weights, drawn), (unseen, same, also) = runs
    assert seen.history == unseen.history and seen.episodes == unseen.episodes and drawn[0] == also[0]
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert unseen.watched == [] and [e.step for e in seen.watched[:: watching.RECORDED]] == [0, 2, 4, 5]
    for n in range(watching.RECORDED):
        own = [e for e in seen.watched if e.problem == n]
        assert {(e.question, e.answer) for e in own} == {tuple(held_out[n][k] for k in ("question", "answer"))}
        assert len({e.position for e in own}) == 1 and all(e.position == len(e.tokens) - 1 for e in own)
        assert all(len(e.thoughts) == 3 for e in own)


def test_the_first_watched_thoughts_are_those_of_the_model_as_given():
    model, tokenizer = tiny_quiet_star()
    held_out = problems("validation", 2)
    result = r.train_quiet_star(model, tokenizer, problems(size=24), held_out, muon_lr=0.3, adamw_lr=0.3, **SHORT)
    fresh = tiny_quiet_star()[0]
    assert len(result.watched) == 4 * len(held_out)
    assert result.watched[0].base_tokens[0][1] == pytest.approx(
        likeliest(fresh, tokenizer, result.watched[0].tokens), abs=1e-3
    )
    first, last = ([[t.tokens for t in e.thoughts] for e in part] for part in (result.watched[:2], result.watched[-2:]))
    assert first != last, "such rates leave no thought as it was"


def test_a_stopped_training_goes_on_watching(tmp_path):
    found = []
    for stop in (None, 3, None):
        model, tokenizer = tiny_quiet_star()
        saving = stopped_after(stop, tmp_path if stop or found else None)
        try:
            found.append(
                r.train_quiet_star(
                    model, tokenizer, problems(size=24), problems("validation", 6), checkpoint=saving, **SHORT
                )
            )
        except InterruptedError:
            assert stop
    assert found[0].watched == found[1].watched and len(found[0].watched) == 4 * watching.RECORDED
