"""MuonGrokfast against torch's own optimizers and against the rules written out here."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qs_lib.training import optim
from qs_lib.training.optim import MuonGrokfast, orthogonalize, split_parameters


def tiny_llama(tied=True, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
    )


def set_gradients(model, step):
    """The same gradients for any model of this shape: of rank 4 plus noise, as real ones are far from white."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    for p in model.parameters():
        noise = draw(*p.shape)
        p.grad = noise if p.ndim < 2 else draw(p.shape[0], 4) @ draw(4, p.shape[1]) + 0.1 * noise


def moved(model, start):
    return [p.detach() - q.detach() for p, q in zip(model.parameters(), start.parameters(), strict=True)]


def relative_error(ours, theirs):
    return max((a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)).item()


@pytest.mark.parametrize(("adjust_lr_fn", "bf16"), [("original", True), ("original", False), ("match_rms_adamw", True)])
def test_lambda_zero_is_torch_muon_and_adamw(adjust_lr_fn, bf16, monkeypatch):
    monkeypatch.setattr(optim, "FAST_BF16", bf16)
    start = tiny_llama()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = MuonGrokfast(
        ours, muon_lr=0.02, adamw_lr=3e-3, grokfast_lambda=0, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn
    )
    hidden, rest = ([p for _, p in part] for part in split_parameters(theirs))
    references = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        for reference in references:
            reference.step()
    hidden_ids = {id(p) for p in hidden}
    pairs = list(zip(moved(ours, start), moved(theirs, start), theirs.parameters(), strict=True))
    # torch orthogonalises in bfloat16 whatever the matrix; 8 bits and 5 steps leave about 1 % between two orders of
    # summation, and more against float32. AdamW is the same arithmetic.
    assert relative_error(*zip(*[(a, b) for a, b, p in pairs if id(p) in hidden_ids], strict=True)) < 0.02
    assert relative_error(*zip(*[(a, b) for a, b, p in pairs if id(p) not in hidden_ids], strict=True)) < 1e-5
    assert all("slow_gradient" not in state for state in optimizer.state.values())


def test_lambda_zero_trains_like_torch():
    start = tiny_llama()
    ids = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for reference in (False, True):
        model = copy.deepcopy(start)
        hidden, rest = ([p for _, p in part] for part in split_parameters(model))
        optimizers = [MuonGrokfast(model, 0.02, 3e-3, grokfast_lambda=0)]
        if reference:
            optimizers = [
                torch.optim.Muon(hidden, lr=0.02, weight_decay=0),
                torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0),
            ]
        for _ in range(20):
            loss = model(ids, labels=ids).loss
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[1] < 2


@pytest.mark.parametrize(("rows", "cols", "tolerance"), [(48, 48, 1e-4), (1, 7, 1e-5), (8, 300, 1e-4), (64, 96, 0.03)])
def test_orthogonalize_is_the_quintic_iteration(rows, cols, tolerance, monkeypatch):
    monkeypatch.setattr(optim, "FAST_BF16", True)
    x = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):  # on singular values the matrix polynomial is a scalar one
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    exact = u @ torch.diag_embed(s) @ vh
    assert (orthogonalize(x) - exact).norm() / exact.norm() < tolerance
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_filter_is_the_published_ema_rule():
    """mu_0 = g_0, mu_t = a mu_(t-1) + (1 - a) g_t, so mu_t = a^t g_0 + (1 - a) sum_(s=1..t) a^(t-s) g_s."""
    a, lam = 0.9, 2.0
    start = tiny_llama()
    filtered, by_hand, inverted = (copy.deepcopy(start) for _ in range(3))
    optimizer = MuonGrokfast(filtered, 0.02, 1e-3, grokfast_lambda=lam, grokfast_alpha=a)
    plain, wrong = (MuonGrokfast(m, 0.02, 1e-3, grokfast_lambda=0) for m in (by_hand, inverted))
    history = []
    for t in range(8):
        set_gradients(filtered, t)
        history.append([p.grad.clone() for p in filtered.parameters()])
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(filtered.parameters(), history[-1], strict=True))
        weights = [a**t] + [(1 - a) * a ** (t - s) for s in range(1, t + 1)]
        slow = [sum(w * g for w, g in zip(weights, grads, strict=True)) for grads in zip(*history, strict=True)]
        for p, q, g, mu in zip(by_hand.parameters(), inverted.parameters(), history[-1], slow, strict=True):
            p.grad = g + lam * mu
            q.grad = g + lam * (g - mu)  # the sign error of the published Muon x Grokfast
        plain.step()
        wrong.step()
    for p, mu in zip(filtered.parameters(), slow, strict=True):
        torch.testing.assert_close(optimizer.state[p]["slow_gradient"], mu)
    # Between the two only float32 rounding, which a bfloat16 Newton-Schulz can turn into its own last bit.
    assert relative_error(moved(filtered, start), moved(by_hand, start)) < 0.01
    assert relative_error(moved(inverted, start), moved(by_hand, start)) > 0.3


def test_resume_is_bit_exact_without_pickle():
    def make(model):
        optimizer = MuonGrokfast(
            model, 0.02, 1e-3, grokfast_lambda=0.5, weight_decay=0.01, token_rows=[3, 5], token_scale=10
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))

    straight = tiny_llama(tied=False)
    optimizer, scheduler = make(straight)
    for t in range(6):
        if t == 3:
            state = optimizer.state_dict()
            tensors = save({f"{i}.{k}": v for i, s in state["state"].items() for k, v in s.items()})
            rest = json.dumps([state["param_groups"], scheduler.state_dict()])
            resumed = copy.deepcopy(straight)
        set_gradients(straight, t)
        optimizer.step()
        scheduler.step()

    optimizer2, scheduler2 = make(resumed)
    groups, schedule = json.loads(rest)
    state = {}
    for key, tensor in load(tensors).items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = tensor
    optimizer2.load_state_dict({"state": state, "param_groups": groups})
    scheduler2.load_state_dict(schedule)
    for t in range(3, 6):
        set_gradients(resumed, t)
        optimizer2.step()
        scheduler2.step()
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == optimizer2.state[q].keys()
        assert "slow_gradient" in optimizer.state[p]
        assert all(torch.equal(optimizer.state[p][k], optimizer2.state[q][k]) for k in optimizer.state[p])


def names(optimizer, group):
    return {n for g in optimizer.param_groups if g["name"] == group for n in g["param_names"]}


@pytest.mark.parametrize("tied", [True, False])
def test_routing_llama(tied):
    optimizer = MuonGrokfast(tiny_llama(tied))
    muon, adamw = names(optimizer, "muon"), names(optimizer, "adamw")
    assert len(muon) == 14 and all(n.endswith("proj.weight") for n in muon)
    assert "model.embed_tokens.weight" in adamw and ("lm_head.weight" in adamw) != tied
    assert all(p.ndim == 2 for p in optimizer.param_groups[0]["params"])
    model_names = {n for n, _ in tiny_llama(tied).named_parameters()}
    assert muon | adamw == model_names and not muon & adamw


def test_routing_gpt2_and_plain_modules():
    gpt2 = MuonGrokfast(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4)))
    assert names(gpt2, "muon") == {
        f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= names(gpt2, "adamw")

    plain = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "hidden": nn.Linear(4, 6),
            "gate": nn.Linear(6, 1),
            "unembed": nn.Linear(6, 7, bias=False),
            "conv": nn.Conv1d(2, 3, 5),
        }
    )
    assert names(MuonGrokfast(plain), "muon") == {"hidden.weight"}

    shapes = [(6, 4), (6,), (6, 1), (2, 3, 4)]
    by_shape = MuonGrokfast([nn.Parameter(torch.ones(shape)) for shape in shapes])
    assert names(by_shape, "muon") == {"parameter 0"}
    assert names(by_shape, "adamw") == {"parameter 1", "parameter 2", "parameter 3"}
    with pytest.raises(ValueError, match="Muon takes matrices only, not gain"):
        by_shape.add_param_group({"name": "muon", "params": [("gain", nn.Parameter(torch.ones(3)))], "lr": 0.1})


def test_routing_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_llama(tied=False), config)
    optimizer = MuonGrokfast(model, token_rows=[1], token_scale=2)
    assert len(names(optimizer, "muon")) == 4 and all("lora_B" in n for n in names(optimizer, "muon"))
    assert len(names(optimizer, "adamw")) == 4 and all("lora_A" in n for n in names(optimizer, "adamw"))
    assert [n.split(".")[-2] for n in names(optimizer, "tokens")] == ["default"]  # the copy of the head
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)


@pytest.mark.parametrize(
    ("name", "bad"), [("model.layers.1.mlp.up_proj.weight", math.nan), ("model.norm.weight", math.inf)]
)
def test_non_finite_gradient_names_the_tensor_and_changes_nothing(name, bad):
    model = tiny_llama()
    optimizer = MuonGrokfast(model, grokfast_lambda=0.1)
    for t in range(2):
        set_gradients(model, t)
        optimizer.step()
    weights = [p.clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(model, 2)
    dict(model.named_parameters())[name].grad.view(-1)[-1] = bad
    with pytest.raises(FloatingPointError, match=f"in {name};"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])

    set_gradients(model, 2)
    model.model.norm.weight.grad.fill_(1e30)  # finite, though its norm is not
    optimizer.step()


@pytest.mark.parametrize("tied", [True, False])
def test_token_scale_scales_the_update(tied):
    rows, others, kept = [3, 5, 39], [0, 4, 38], 1 - 1e-4 * 0.1  # what weight decay leaves, of every row
    start = tiny_llama(tied)
    models = {scale: copy.deepcopy(start) for scale in (1, 100)}
    optimizers = {
        scale: MuonGrokfast(m, adamw_lr=1e-4, weight_decay=0.1, token_rows=torch.tensor(rows), token_scale=scale)
        for scale, m in models.items()
    }
    for t in range(3):
        before = {
            s: [end.weight.detach().clone() for end in (m.get_input_embeddings(), m.get_output_embeddings())]
            for s, m in models.items()
        }
        for scale, model in models.items():
            set_gradients(model, t)
            optimizers[scale].step()
        for i, getter in enumerate(("get_input_embeddings", "get_output_embeddings")):
            delta = {s: getattr(m, getter)().weight.detach() - before[s][i] * kept for s, m in models.items()}
            # The scale-1 change is read from rounded weights: a few 1e-9 of about 1e-4.
            torch.testing.assert_close(delta[100][rows], 100 * delta[1][rows], rtol=1e-3, atol=1e-6)
            assert torch.equal(delta[100][others], delta[1][others])
            assert delta[1][rows].abs().mean() > 3e-5
    frozen = tiny_llama()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(ValueError, match="token_rows"):
        MuonGrokfast(frozen, token_rows=rows)


def test_token_scale_is_adam_at_a_larger_rate():
    start = tiny_llama(tied=False)
    scaled, faster = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = MuonGrokfast(scaled, adamw_lr=1e-4, token_rows=[2, 7], token_scale=100, grokfast_lambda=0)
    weight = faster.get_input_embeddings().weight
    reference = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    for t in range(10):
        set_gradients(scaled, t)
        set_gradients(faster, t)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(scaled.get_input_embeddings().weight[[2, 7]], weight[[2, 7]], rtol=1e-5, atol=1e-6)


def test_scheduler_reaches_every_group():
    start = tiny_llama()
    full, half, none = (copy.deepcopy(start) for _ in range(3))
    for model, factor in ((full, 1), (half, 0.5), (none, 0)):
        optimizer = MuonGrokfast(model, token_rows=[1], token_scale=3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, f=factor: f)
        set_gradients(model, 0)
        optimizer.step()
        scheduler.step()
        assert [g["name"] for g in optimizer.param_groups] == ["muon", "adamw", "tokens"]
    for whole, part in zip(moved(full, start), moved(half, start), strict=True):
        torch.testing.assert_close(part, whole / 2, rtol=1e-2, atol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(none.parameters(), start.parameters(), strict=True))


def test_missing_gradients_closure_and_settings():
    model = tiny_llama()
    start = copy.deepcopy(model)
    optimizer = MuonGrokfast(model)
    optimizer.step()
    assert not optimizer.state
    ids = torch.arange(8)[None]

    def closure():
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    model.model.layers[0].requires_grad_(False)
    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    same = zip(model.model.layers[0].parameters(), start.model.layers[0].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in same)
    for wrong in ({"adjust_lr_fn": "none"}, {"grokfast_alpha": 1.0}, {"momentum": -0.1}, {"muon_lr": -1.0}):
        with pytest.raises(ValueError):
            MuonGrokfast(model, **wrong)


# Torch's parameter groups -------------------------------------------------------------------------------------------


def steps_of(optimizer, parameters, count=3):
    """The weights after a few steps on fixed gradients."""
    for t in range(count):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def layers():
    torch.manual_seed(0)
    return nn.Linear(4, 6), nn.Linear(6, 3)


@pytest.mark.parametrize(
    "grouped",
    [
        lambda a, b: [{"params": a.parameters()}, {"params": list(b.parameters())}],
        lambda a, b: [{"params": list(a.named_parameters("a"))}, {"params": list(b.named_parameters("b"))}],
        lambda a, b: [{"params": [a.weight, b.weight]}, {"params": a.bias}, {"params": [b.bias], "weight_decay": 0.1}],
        lambda a, b: ({"params": [p], "grokfast_lambda": 0.1} for net in (a, b) for p in net.parameters()),
    ],
)
def test_groups_are_trained_as_the_plain_list_is(grouped):
    plain, groups = layers(), layers()
    expected = [p for net in plain for p in net.parameters()]
    given = [p for net in groups for p in net.parameters()]
    found = steps_of(MuonGrokfast(grouped(*groups), weight_decay=0.1), given)
    wanted = steps_of(MuonGrokfast(expected, weight_decay=0.1), expected)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_a_group_says_holds_for_its_own_parameters():
    a, b = layers()
    optimizer = MuonGrokfast(
        [{"params": a.parameters(), "lr": 0.5, "betas": (0.5, 0.6)}, {"params": b.parameters()}], weight_decay=0.2
    )
    optimizer.add_param_group({"params": nn.Linear(3, 3).named_parameters("c"), "weight_decay": 0.0, "momentum": 0.5})
    shown = [(g["name"], g["lr"], g["weight_decay"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups]
    assert shown == [
        ("muon", 0.5, 0.2, 0.95, None),
        ("adamw", 0.5, 0.2, None, (0.5, 0.6)),
        ("muon", 0.02, 0.2, 0.95, None),
        ("adamw", 3e-4, 0.2, None, (0.9, 0.95)),
        ("muon", 0.02, 0.0, 0.5, None),
        ("adamw", 3e-4, 0.0, None, (0.9, 0.95)),
    ]
    assert [n for g in optimizer.param_groups for n in g["param_names"]] == [
        *("parameter 0", "parameter 1", "parameter 2", "parameter 3", "c.weight", "c.bias")
    ]


def test_layers_are_unfrozen_in_the_middle_of_a_training_and_copies_know_how():
    a, b = layers()
    optimizer = MuonGrokfast(a)
    steps_of(optimizer, list(a.parameters()))
    before = copy.deepcopy(b.state_dict())
    again = copy.deepcopy(optimizer)
    for one in (optimizer, again):
        one.add_param_group({"params": list(b.named_parameters())})
    steps_of(optimizer, [*a.parameters(), *b.parameters()])
    assert not any(torch.equal(value, before[name]) for name, value in b.state_dict().items())
    assert [g["name"] for g in again.param_groups] == ["muon", "adamw", "muon", "adamw"]


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        (lambda net: [{"params": [net.weight], "weight_decy": 0.0}], {}, "did you mean weight_decay"),
        (
            lambda net: [{"params": [net.weight], "name": "decay"}],
            {},
            "named 'decay'; it must be muon, adamw or tokens",
        ),
        (lambda net: [{"params": [net.weight], "lr": -1.0}], {}, "must not be negative"),
        (lambda net: [{"params": [net.weight], "betas": (0.9, 1.0)}], {}, "betas must lie in"),
        (lambda net: [{"params": [net]}], {}, "parameter 0 is a Linear"),
        (lambda net: [{"params": [net.weight]}, {"params": [net.weight]}], {}, "more than one parameter group"),
        (lambda net: dict(net.named_parameters()), {}, "parameter 0 is a str"),
        (lambda net: [], {}, "empty parameter list"),
        (lambda net: net.requires_grad_(False), {}, "empty parameter list"),
        (lambda net: net.weight, {}, "should be an iterable"),
        (lambda net: [net.weight], {"token_rows": [0]}, "token_rows needs the model itself"),
        *[
            (lambda net: net, {name: -0.1}, "must not be negative|lie in|above 0")
            for name in ("muon_lr", "adamw_lr", "weight_decay", "grokfast_lambda", "grokfast_alpha", "momentum", "eps")
        ],
        (lambda net: net, {"qk_clip_threshold": 0.0}, "above 0"),
        (lambda net: net, {"token_scale": 0.0}, "above 0"),
        (lambda net: net, {"muon_lr": math.nan}, "must not be negative"),
        (lambda net: net, {"betas": (1.0, 0.9)}, "lie in"),
    ],
)
def test_groups_and_settings_that_cannot_be_used_are_one_sentence(given, settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        MuonGrokfast(given(nn.Linear(4, 4)), **settings)
