"""The mixture p = sum_k w_k p_k against numbers on paper, and both of its forms from training to evaluation."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import problems, tiny_quiet_star

import qs_lib as qs
from qs_lib import mixing
from qs_lib.data.batches import answer_batch
from qs_lib.data.tokens import encode, encode_context
from qs_lib.errors import WorkbookError
from qs_lib.evaluation import accuracy, episodes, likelihood
from qs_lib.mixing import MixingHead, mix_hidden, mix_log_probs

FORMS = ("log_probs", "hidden")
PRECISIONS = (torch.float32, torch.float64)


def mixed_with_gradients(weights, base, thought, dtype):
    """Log-prob of one token, its gradient for the weights and for the log-probs of all branches."""
    weights, base, thought = (
        torch.tensor(x, dtype=dtype).requires_grad_() for x in (weights, np.log(base), np.log(thought))
    )
    mixed = mix_log_probs(weights, base, thought)
    mixed.backward()
    return mixed.item(), weights.grad.tolist(), [base.grad.item(), *thought.grad.tolist()]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_value_and_gradients_on_paper(dtype):
    """p = 0.5 x 0.8 + 0.25 x 0.1 + 0.25 x 0.5 = 0.55; d log p / d w_k = p_k / p; d log p / d log p_k = w_k p_k / p."""
    value, for_weights, for_branches = mixed_with_gradients([0.5, 0.25, 0.25], 0.8, [0.1, 0.5], dtype)
    assert value == pytest.approx(math.log(0.55))
    assert for_weights == pytest.approx([0.8 / 0.55, 0.1 / 0.55, 0.5 / 0.55])
    assert for_branches == pytest.approx([0.4 / 0.55, 0.025 / 0.55, 0.125 / 0.55]) and sum(for_branches) == (
        pytest.approx(1)
    )


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_gradient_does_not_vanish_where_the_truth_has_almost_no_probability(dtype):
    """The gate is shut and the truth has 1e-12: p = 1e-12, and a thought that gives it 0.5 has gradient 0.5 / 1e-12."""
    value, for_weights, for_branches = mixed_with_gradients([1.0, 0.0, 0.0], 1e-12, [0.5, 2e-12], dtype)
    assert value == pytest.approx(math.log(1e-12))
    assert for_weights == pytest.approx([1.0, 5e11, 2.0], rel=1e-4) and for_branches == [1.0, 0.0, 0.0]
    value, for_weights, for_branches = mixed_with_gradients([0.5, 0.5], 1e-12, [3e-12], dtype)
    assert value == pytest.approx(math.log(2e-12)) and for_weights == pytest.approx([0.5, 1.5], rel=1e-4)
    assert for_branches == pytest.approx([0.25, 0.75], rel=1e-4)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.0, 0.5, 0.5]])
def test_impossible_tokens(weights, dtype):
    """Columns: ordinary, impossible after the first thought, without one, but after the last, everywhere."""
    probabilities = [[0.5, 0.5, 0.0, 0.0, 0.0], [0.6, 0.0, 0.4, 0.0, 0.0], [0.2, 0.1, 0.3, 0.4, 0.0]]
    w = torch.tensor(weights, dtype=dtype).requires_grad_()
    logs = torch.tensor(
        np.log(np.maximum(probabilities, 0), where=np.array(probabilities) > 0, out=np.full((3, 5), -np.inf)),
        dtype=dtype,
    )
    logs.requires_grad_()
    mixed = mix_log_probs(w, logs[0], logs[1:])
    expected = np.array(weights) @ np.array(probabilities)
    assert mixed.exp().tolist() == pytest.approx(expected, abs=1e-7) and mixed[4] == -torch.inf
    for column in range(5):
        grads = torch.autograd.grad(mixed[column], (w, logs), retain_graph=True)
        assert all(g.isfinite().all() for g in grads), column
        if expected[column] > 0:
            of_weights = [row[column] / expected[column] for row in probabilities]
            assert grads[0].tolist() == pytest.approx(of_weights, rel=1e-5), column
            of_logs = [x * p for x, p in zip(weights, of_weights, strict=True)]
            assert grads[1][:, column].tolist() == pytest.approx(of_logs, rel=1e-5)
        else:  # only the weight of a branch that could say it has a gradient, the largest there is
            could = [float(row[column] > 0) * math.exp(40) for row in probabilities]
            assert grads[0].tolist() == pytest.approx(could, rel=1e-4) and not grads[1].any()


def by_force(weights, base, thought):
    """Sum over branches in Python, one number at a time."""
    out = torch.empty_like(base)
    for index in np.ndindex(*base.shape):
        row, rest = index[: weights.dim() - 1], index[weights.dim() - 1 :]
        branches = [base[index], *(thought[*row, k, *rest] for k in range(thought.shape[len(row)]))]
        out[index] = math.log(sum(w.item() * math.exp(b.item()) for w, b in zip(weights[row], branches, strict=True)))
    return out


@pytest.mark.parametrize("shape", [((), (), 1), ((3,), (), 4), ((), (5,), 2), ((2, 3), (4,), 3), ((2,), (2, 3), 2)])
def test_every_shape_against_brute_force(shape):
    before, rest, k = shape
    torch.manual_seed(0)
    weights = torch.rand(*before, 1 + k, dtype=torch.float64).softmax(-1).requires_grad_()
    base = torch.randn((*before, *rest), dtype=torch.float64).requires_grad_()
    thought = torch.randn((*before, k, *rest), dtype=torch.float64).requires_grad_()
    mixed = mix_log_probs(weights, base, thought)
    assert mixed.shape == base.shape and mixed.allclose(by_force(weights, base, thought))
    at = len(before)
    wide = weights.reshape(*weights.shape, *[1] * len(rest))
    plainly = (wide * torch.cat([base.unsqueeze(at), thought], at).exp()).sum(at).log()
    given = (weights, base, thought)
    for ours, theirs in zip(
        torch.autograd.grad(mixed.sum(), given), torch.autograd.grad(plainly.sum(), given), strict=True
    ):
        assert ours.allclose(theirs)


def test_a_shut_gate_leaves_the_plain_prediction_bit_by_bit():
    base, thought = torch.randn(7, 50).log_softmax(-1), torch.randn(7, 3, 50).log_softmax(-1)
    assert torch.equal(mix_log_probs(torch.tensor([1.0, 0, 0, 0]).expand(7, -1), base, thought), base)


def test_the_gate_opens_from_exactly_0():
    """The truth has 1e-12 without a thought and 0.5 with one: a step opens the gate. With 1e-14 it stays shut."""
    for good, open_ in ((0.5, True), (1e-14, False)):
        torch.manual_seed(0)
        head = MixingHead(8)
        base, thought = torch.randn(8), torch.randn(2, 8)
        before = head(base, thought)
        assert before.tolist() == [1, 0, 0]
        (-mix_log_probs(before, torch.tensor(1e-12).log(), torch.full((2,), good).log())).backward()
        torch.optim.SGD(head.parameters(), 1e-3).step()
        assert (head(base, thought)[0] < 1) == open_


def test_the_clip_of_the_gate_is_exact():
    head = MixingHead(8)
    for bias in (-7.3, -1e-9, 0.1, 1.0, 1 + 1e-6, 7.3, 1234.567):
        torch.nn.init.constant_(head.gate.bias, bias)
        weights = head(torch.randn(5, 8), torch.randn(5, 2, 8))
        gate = min(max(bias, 0.0), 1.0)
        assert weights[:, 0].tolist() == [(1 - torch.tensor(gate)).item()] * 5 and (weights >= 0).all()
        weights[:, 1:].sum().backward()
        assert head.gate.bias.grad == 5
        head.gate.bias.grad = None


def test_a_gate_by_place_weighs_all_thoughts_alike_whatever_they_say():
    """It is the gate of h_0 with 0 beside it, by hand. Which thought counts is still a matter of what they say."""
    torch.manual_seed(0)
    head = MixingHead(8, gate="place")
    for weight in (head.gate.weight, head.score.weight):
        torch.nn.init.normal_(weight, std=0.3)
    torch.nn.init.constant_(head.gate.bias, 0.5)
    base, one, other = torch.randn(8), torch.randn(2, 8), torch.randn(2, 8)
    by_hand = head.gate(torch.nn.functional.gelu(head.features(torch.cat([base, torch.zeros(8)]))))
    weights, others = head(base, one), head(base, other)
    assert 0 < by_hand < 1 and weights[0].item() == others[0].item() == pytest.approx(1 - by_hand.item())
    assert weights[1].item() != pytest.approx(weights[2].item()) and weights[1].item() != pytest.approx(
        others[1].item()
    )
    with pytest.raises(WorkbookError, match="gate is 'both'"):
        MixingHead(8, gate="both")


def test_a_gate_by_place_is_not_pushed_past_an_end_of_its_clip():
    """By hand: a gradient passes at an end of the clip only if a step against it leads inwards."""
    base, thought = torch.randn(5, 8), torch.randn(5, 2, 8)
    for bias, opens, shuts in ((-0.5, 1, 0), (0.0, 1, 0), (0.4, 1, 1), (1.0, 0, 1), (2.5, 0, 1)):
        for sign, passes in ((-1, opens), (1, shuts)):  # descent on -weight opens the gate
            head = MixingHead(8, gate="place")
            torch.nn.init.constant_(head.gate.bias, bias)
            (sign * head(base, thought)[:, 1:].sum()).backward()
            assert head.gate.bias.grad == sign * passes * 5, (bias, sign)


@pytest.mark.parametrize("planted", (False, True))
def test_places_where_thoughts_always_help_do_not_open_the_gate_elsewhere(planted, monkeypatch):
    """Planted: gradients that pass the clip everywhere. Then the few other places stay open."""
    if planted:
        monkeypatch.setattr(mixing, "_inward", lambda gate, gradient: gradient)
    torch.manual_seed(0)
    helped = torch.arange(64) % 16 > 0  # most places
    base = torch.randn(8) + 0.3 * torch.randn(64, 8) + 0.5 * torch.where(helped, 1.0, -1.0)[:, None] * torch.randn(8)
    plain = torch.where(helped, 0.2, 0.9).log()
    after = torch.where(helped, 0.9, 0.2).log()[:, None].expand(-1, 2)
    head = MixingHead(8, gate="place")
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(300):
        gain = mix_log_probs(head(base, torch.zeros(64, 2, 8)), plain, after) - plain
        optimizer.zero_grad()
        (-gain.mean()).backward()
        optimizer.step()
    assert gain[helped].mean() > 1.3  # ln 4.5 = 1.50 at most
    assert (gain[~helped].mean() > -0.01) != planted


def test_the_gate_is_a_setting_that_is_saved_with_the_model(tmp_path):
    model, _ = tiny_quiet_star(gate="place")
    model.save_pretrained(tmp_path)
    again = qs.QuietStarForCausalLM.from_pretrained(tmp_path)
    assert again.mixing_head.by_place and not tiny_quiet_star()[0].mixing_head.by_place


# Both forms, from training to every evaluation, against plain passes that share nothing with the library.


@pytest.fixture(scope="module", params=FORMS)
def trained(request):
    """A model with an open gate after three steps of training in one form of mixing, and what those steps said."""
    model, tokenizer = tiny_quiet_star(mixing=request.param)
    torch.manual_seed(1)
    model.lm.model.norm.weight.data *= 6  # sure predictions, so that the two forms differ
    torch.nn.init.normal_(model.mixing_head.gate.weight, std=0.1)
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.5)
    torch.nn.init.normal_(model.mixing_head.score.weight, std=0.2)
    budget = {"num_thoughts": 3, "thought_length": 8}
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = qs.train_quiet_star(
        model, tokenizer, problems(), problems("validation", 4), steps=3, batch_size=4, **budget
    )
    assert len(result.history) == 3 and all(0 < m["no_thought_weight"] < 1 for m in result.history)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("mixing_head.gate" in name for name in moved) and any(name.startswith("lm.") for name in moved)
    return model, tokenizer


@torch.no_grad()
def naively(model, rows, form, weights=None, among=None, sharpening=1.0):
    """Next-token log-probs after ``rows`` of ids, the first without a thought: one plain pass each, then mixed."""
    hidden = torch.stack([model.lm.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows])
    weights = model.mixing_head(hidden[0], hidden[1:]) if weights is None else torch.tensor(weights)

    def predict(states):
        logits = model.lm.lm_head(states)
        logits[..., model.config.hidden_ids] = -torch.inf
        return ((logits if among is None else logits[..., among]) / sharpening).softmax(-1)

    if form == "hidden":
        return predict((weights[:, None] * hidden).sum(0)).log()
    return (weights[:, None] * predict(hidden)).sum(0).log()


def rows_after(text, thoughts, row, place=0, written=()):
    """``text`` and ``text`` + each thought, with what is ``written`` behind: lists of ids."""
    ends = thoughts.lengths[row, place].tolist()
    own = [t[:n] for t, n in zip(thoughts.tokens[row, place].tolist(), ends, strict=True)]
    return [[*text, *thought, *written] for thought in ([], *own)]


BUDGET = {"num_thoughts": 2, "thought_length": 6}
ASKED = problems("test", 4)


def as_trained(model, found, expected: dict, atol=1e-4):
    """What is ``found`` is what the model's own form of mixing expects, and not what the other one does."""
    own, other = (np.asarray(expected[form]) for form in sorted(FORMS, key=lambda form: form != model.config.mixing))
    np.testing.assert_allclose(found, own, atol=atol)
    assert np.abs(own - other).max() > 20 * atol


def test_the_truth_in_training(trained):
    model, tokenizer = trained
    ids, mask, at = answer_batch(tokenizer, ASKED)
    thoughts = model.think(ids, mask, at, torch.Generator().manual_seed(0), **BUDGET)
    scored = qs.rescore_thoughts(model.lm, ids, thoughts, mask, n_true=2, forbid_true=model.config.hidden_ids)
    mixed, expected = model.mix_truth(scored), {form: [] for form in FORMS}
    for row, step in np.ndindex(4, 2):
        start = at[row, 0].item() + 1
        text, written = ids[row, :start].tolist(), ids[row, start : start + step].tolist()
        for form in FORMS:
            rows = rows_after(text, thoughts, row, written=written)
            expected[form].append(naively(model, rows, form)[ids[row, start + step]].item())
    as_trained(model, mixed.flatten().tolist(), expected)
    mixed.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.mixing_head.parameters())
    model.zero_grad()


def test_a_large_vocabulary_is_read_in_parts(trained, monkeypatch):
    model, tokenizer = trained
    ids, mask, at = answer_batch(tokenizer, ASKED)
    thoughts = model.think(ids, mask, at, torch.Generator().manual_seed(0), **BUDGET)
    found = []
    for numbers in (8_000_000, 500):
        monkeypatch.setattr("qs_lib.thoughts.attention._LOGIT_NUMBERS", numbers)
        scored = qs.rescore_thoughts(model.lm, ids, thoughts, mask, forbid_true=model.config.hidden_ids)
        mixed = model.mix_truth(scored)
        mixed.sum().backward()
        found.append((mixed, model.mixing_head.gate.weight.grad.clone()))
        model.zero_grad()
        assert not mixed[~scored.valid].any()
    assert all(one.allclose(two, atol=1e-5) for one, two in zip(*found, strict=True))


def test_the_likelihood_of_texts(trained):
    model, tokenizer = trained
    texts = [(p["question"], p["answer"] + " .") for p in ASKED]
    drawn, think = [], model.think
    model.think = lambda *given, **more: drawn.append(think(*given, **more)) or drawn[-1]
    found = likelihood.text_log_likelihood(model, tokenizer, texts, positions=3, **BUDGET)
    del model.think
    expected, alone = ({form: np.zeros((4, 3)) for form in FORMS} for _ in range(2))
    for row, place in np.ndindex(4, 3):
        ids, at = encode(tokenizer, *texts[row]).ids, drawn[0].positions[row, place].item()
        rows = rows_after(ids[: at + 1], drawn[0], row, place)
        for form in FORMS:
            expected[form][row, place] = naively(model, rows, form)[ids[at + 1]]
            alone[form][row, place] = naively(model, rows, form, [0.0, 0.5, 0.5])[ids[at + 1]]
    as_trained(model, found["with"], expected)
    as_trained(model, found["alone"], alone)


def test_the_probability_of_answers(trained):
    model, tokenizer = trained
    questions, sharpenings = [p["question"] for p in ASKED], (0.5, 1.0)
    drawn = episodes.draw_thoughts(model.think, tokenizer, questions, 1, **BUDGET)
    found = likelihood.answer_probability(model, tokenizer, ASKED, sharpenings, seed=1, **BUDGET)
    answers = [encode(tokenizer, q, p["answer"] + " .") for q, p in zip(questions, ASKED, strict=True)]
    answers = [s.ids[s.start : -1] for s in answers]
    among = sorted({token for ids in answers for token in ids})
    expected = {form: np.ones((2, 4)) for form in FORMS}
    for (at, sharpening), (row, answer) in ((x, y) for x in enumerate(sharpenings) for y in enumerate(answers)):
        for form, (step, token) in ((f, y) for f in FORMS for y in enumerate(answer)):
            rows = rows_after(encode_context(tokenizer, questions[row]), drawn[row], 0, written=answer[:step])
            predicted = naively(model, rows, form, among=among, sharpening=sharpening)
            expected[form][at, row] *= predicted[among.index(token)].exp().item()
    as_trained(model, np.log(found["with"]), {form: np.log(p) for form, p in expected.items()}, atol=5e-4)


def test_decoding_and_episodes(trained):
    model, tokenizer = trained
    context = encode_context(tokenizer, ASKED[0]["question"])
    one = episodes.think_at(model, tokenizer, ASKED[0]["question"], seed=3, **BUDGET)
    think = model.think(
        torch.tensor([context]), None, torch.tensor([[len(context) - 1]]), torch.Generator().manual_seed(3), **BUDGET
    )
    predicted = {form: naively(model, rows_after(context, think, 0), form).exp() for form in FORMS}
    likeliest = predicted[model.config.mixing].topk(5)
    assert [t for t, _ in one.mixed_tokens] == [tokenizer.decode([i]) for i in likeliest.indices.tolist()]
    listed = {form: p[likeliest.indices].tolist() for form, p in predicted.items()}
    as_trained(model, [p for _, p in one.mixed_tokens], listed)
    for p in ASKED:
        context, written = encode_context(tokenizer, p["question"]), []
        thoughts = model.think(
            torch.tensor([context]),
            None,
            torch.tensor([[len(context) - 1]]),
            torch.Generator().manual_seed(3),
            **BUDGET,
        )
        given = thoughts.tokens[:, 0], thoughts.lengths[:, 0]
        reply = accuracy.decode_with_thoughts(model, tokenizer, [context], *given, "head", 4)[0]
        for _ in range(4):
            rows = rows_after(context, thoughts, 0, written=written)
            written.append(naively(model, rows, model.config.mixing).argmax().item())
        assert reply == written[: written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else 4]
        truth = torch.tensor([[*context, *reply, tokenizer.eos_token_id]])
        given = truth, torch.ones_like(truth), thoughts
        (at, token), *_ = accuracy.first_difference(model, *given, max_new_tokens=len(reply))[0].tolist()
        if len(reply) < 4:  # it ended by itself
            assert at == accuracy.WRITTEN
        else:  # its greedy decoding would go on where the text ends
            assert (at, token) == (
                4,
                naively(model, rows_after(context, thoughts, 0, written=written), model.config.mixing).argmax(),
            )
        other = truth.clone()
        other[0, len(context)] = (truth[0, len(context)] + 1) % 50
        differs = accuracy.first_difference(model, other, *given[1:], max_new_tokens=len(reply))[0]
        assert differs.tolist() == [[0, truth[0, len(context)]]]
        states = model.lm.model(torch.tensor([context])).last_hidden_state[0, -1], think.hidden[0, 0]
        assert model.mix(*states).shape == (len(tokenizer),)


def test_the_mean_of_hidden_states_by_hand():
    weights, base, thought = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([4.0]), torch.tensor([[0.0], [8.0]])
    assert mix_hidden(weights, base, thought).item() == 4.0


# One home: a second mixture in the library makes this red.

LIBRARY = Path(qs.__file__).parent
WEIGHTS = {
    "weights",
    "mixing",
}  # what variables that hold them are called, beside those that are assigned from the head


def called(node) -> str:
    """The last name of what is called: ``f`` of ``a.b.f(x)``."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def names(node) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def second_mixtures(source: str) -> list[str]:
    """What weighs branches by the mixing head's weights, or averages probabilities that are kept as log-probs."""
    found = []
    for function in [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]:
        calls = {called(node) for node in ast.walk(function)}
        held = set(WEIGHTS) if calls & {"exp", "softmax", "log_softmax", "logsumexp"} else set()
        for node in ast.walk(function):
            makes = isinstance(node, ast.Assign) and called(node.value) in (
                "branch_weights",
                "mixing_weights",
                "mixing_head",
            )
            held |= names(node.targets[0]) if makes else set()
        for node in ast.walk(function):
            sums = called(node) in ("sum", "mean", "logsumexp") and isinstance(node.func, ast.Attribute)
            inner = list(ast.walk(node.func.value)) if sums else []
            products = [n for n in inner if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.Mult, ast.Add))]
            weighed = any(names(n) & held for n in products)
            product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and names(node) & held
            contracted = called(node) in ("einsum", "matmul", "bmm", "tensordot") and names(node) & held
            averaged = called(node) == "mean" and sums and called(node.func.value) in ("exp", "softmax")
            second = called(node) in ("mixing_head", "mix_log_probs", "mix_hidden")
            if weighed or product or contracted or averaged or second:
                found.append(ast.unparse(node))
    return found


def test_there_is_one_mixture():
    files = [f for f in LIBRARY.rglob("*.py") if f.parent.name != "thoughts"]  # they know of no mixing head
    assert len(files) > 30
    found = {f.name: second_mixtures(f.read_text()) for f in files}
    model = found.pop("model.py") + found.pop("mixing.py")
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert sum("mix_log_probs(" in line for line in model) == 2 == sum("mix_hidden(" in line for line in model)


PLANTED = {
    "training": "mixed = base.exp()\nnll = -(weights * mixed).sum(-1).clamp_min(1e-8).log()",
    "likelihood": "mixed = (weights * torch.cat([base.unsqueeze(-1), after], -1).exp()).sum(-1).clamp_min(1e-30).log()",
    "thoughts alone": "found = {'alone': after.exp().mean(-1).log()}",
    "answers": "each = after.softmax(-1)\nmixed = (mixing.unsqueeze(-1) * torch.cat([plain, each], 2)).sum(2)",
    "episodes": "top = _top((mixing[b, 0, :, None] * torch.cat([base[b], after[b, 0]]).exp()).sum(0).log())",
    "in log space": "w = model.branch_weights(base, after)\nmixed = (w.log() + after).logsumexp(-1)",
    "as a product": "share = model.mixing_weights(scored)\nmixed = share @ after.exp()",
    "by einsum": "mixed = torch.einsum('bk,bkv->bv', weights, after.exp())",
    "by the head alone": "total = model.mixing_head(base, after)[0]",
    "by name": "mixed = mix_log_probs(given, base, after)",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_second_mixture_is_seen(name):
    body = "\n".join("    " + line for line in PLANTED[name].splitlines())
    assert second_mixtures(f"def planted(model, scored, base, after):\n{body}\n")
