"""The attention pieces: outputs, log-sum-exps and gradients against a plain softmax."""

import pytest
import torch
from test_thoughts import build, close

from qs_lib.thoughts import attention
from qs_lib.thoughts.attention import Rule, add_sinks, attend, attend_grads, causal_attend, causal_attend_grads, merge


def reference(query, key, value, scale, mask, softcap=None, sinks=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., :-1] @ value, scores.logsumexp(-1)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def tensors(queries=5, keys=7, heads=4, key_heads=2):
    torch.manual_seed(0)
    shapes = [(3, heads, queries, 8), (3, key_heads, keys, 8), (3, key_heads, keys, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("fused", [True, False])
def test_parts_merge_to_the_whole(softcap, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(attention, "_CPU_FLASH", None)
    query, key, value = tensors()
    mask = torch.zeros(3, 1, 5, 7, dtype=torch.float64)
    mask[1, :, 2:, 1:3] = -torch.inf
    expected, expected_lse = reference(query, key, value, 0.3, mask, softcap)
    rule, parts = Rule(0.3, softcap=softcap), [(slice(0, 3), mask[..., :3]), (slice(3, 7), None)]
    done = [attend(query, key[:, :, k], value[:, :, k], rule, m) for k, m in parts]
    output, lse = merge(*done[0], *done[1])
    close(output, expected, 1e-12)
    close(lse, expected_lse, 1e-12)
    grad = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, (query, key, value), grad)
    found = [attend_grads(grad, query, key[:, :, k], value[:, :, k], output, lse, rule, m) for k, m in parts]
    close(found[0][0] + found[1][0], wanted[0], 1e-12)
    for i in (1, 2):
        close(torch.cat([found[0][i], found[1][i]], 2), wanted[i], 1e-12)


@pytest.mark.parametrize("window, softcap", [(None, None), (5, None), (None, 3.0), (5, 3.0), (200, None)])
@pytest.mark.parametrize("length", [9, 150])
def test_causal_attention(window, softcap, length):
    query, key, value = tensors(length, length)
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    expected, expected_lse = reference(query, key, value, 0.3, mask, softcap)
    rule = Rule(0.3, window, softcap)
    output, lse = causal_attend(query, key, value, rule)
    close(output, expected, 1e-12)
    close(lse, expected_lse, 1e-12)
    grad = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, (query, key, value), grad)
    for a, b in zip(causal_attend_grads(grad, query, key, value, output, lse, rule), wanted):
        close(a, b, 1e-12)


def test_sinks():
    query, key, value = tensors()
    sinks = torch.randn(4, dtype=torch.float64)
    expected, expected_lse = reference(query, key, value, 0.3, 0.0, sinks=sinks)
    output, lse = attend(query, key, value, Rule(0.3))
    output, lse = add_sinks(output.transpose(1, 2), lse.transpose(1, 2), sinks)
    close(output.transpose(1, 2), expected, 1e-12)
    close(lse.transpose(1, 2), expected_lse, 1e-12)


def test_a_position_bias_and_a_mask_of_the_family_are_refused():
    layer, mask = torch.nn.Module(), torch.zeros(1)
    with pytest.raises(NotImplementedError, match="position bias"):
        attention.thoughts_attention(layer, *tensors(), None, position_bias=mask)
    with pytest.raises(NotImplementedError, match="a mask of its own"):
        attention.thoughts_attention(layer, *tensors(), mask)


def test_a_view_shares_weights_and_leaves_no_trace():
    model = build("opt").train()
    before = {id(module): dict(vars(module)) for module in model.modules()}
    config = model.config.to_dict()
    seen = attention.view(model)
    assert all(a is b for a, b in zip(seen.parameters(), model.parameters(), strict=True))
    assert not any(module.training for module in seen.modules()) and all(m.training for m in model.modules())
    assert all(vars(module) == before[id(module)] for module in model.modules()) and model.config.to_dict() == config
    assert not {id(module) for module in seen.modules()} & set(before)
