"""Texts that begin alike are read once where they agree, and come out as each of them alone."""

import pytest
import torch
from test_thoughts import FAMILIES, build
from tiny import tiny_lm

from qs_lib.thoughts.attention import backbone, recompute_layers
from qs_lib.thoughts.beginnings import beginnings, row_states
from qs_lib.training.loop import add_adapter
from qs_lib.training.qk_clip import watch_max_logits

PROMPTS = [*range(3, 23)], [*range(3, 9), *range(30, 46)]  # they share six tokens
OWN = [[50 + k, 40 - 2 * k, *range(7, 7 + k)] for k in range(6)]
ROWS = [*(PROMPTS[k % 2] + own for k, own in enumerate(OWN)), [*PROMPTS[0], 5], [9, 8]]
PLACES = [*([0, len(row) - 1, 21] for row in ROWS[:-2]), [20, 4], [1, 0]]


def alone(model, rows, places):
    states = [backbone(model)(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]
    return torch.cat([one[at] for one, at in zip(states, places, strict=True)])


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_each_row_alone(family):
    model = build(family, torch.float64)
    wanted, found = alone(model, ROWS, PLACES), row_states(model, ROWS, PLACES)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_each_row_alone(recomputed):
    lm, tokenizer = tiny_lm()
    trained = add_adapter(lm, tokenizer, 4).train()
    weights = [p for p in trained.parameters() if p.requires_grad]
    torch.manual_seed(0)
    for p in weights:  # B starts at 0
        p.data += 0.05 * torch.randn_like(p)
    slope = torch.randn(sum(map(len, PLACES)), 32)
    wanted = torch.autograd.grad((alone(trained, ROWS, PLACES) * slope).sum(), weights)
    if recomputed:
        recompute_layers(lm)
    found = torch.autograd.grad((row_states(trained, ROWS, PLACES) * slope).sum(), weights)
    assert max((a - b).abs().max() / b.abs().max().clamp(min=1e-6) for a, b in zip(found, wanted, strict=True)) < 1e-4


def test_a_common_beginning_is_read_once():
    model, _ = tiny_lm()
    row_states(model, ROWS, PLACES)  # its family is looked at once
    read = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0].numel()))
    row_states(model, ROWS, PLACES)
    assert sum(read) == sum(map(len, [*PROMPTS, *OWN, [5], [9, 8]]))
    read.clear()
    short = [row[15:] or row[:1] for row in ROWS]  # nothing worth it, and a single token: padded rows
    row_states(model, short, [[0]] * len(short))
    assert sum(read) == len(short) * max(map(len, short))


def test_groups_share_more_than_half():
    assert beginnings([[1, 2, 3, 4, 5], [1, 2, 3, 9], [7, 8], [1, 2, 3, 4, 5]]) == [(3, [0, 3, 1]), (1, [2])]
    assert beginnings([[1, 2], [1, 2]]) == [(1, [0]), (1, [1])]


def test_qk_clip_sees_the_logits_of_texts_that_begin_alike():
    model, _ = tiny_lm()
    with watch_max_logits(model) as watch:
        row_states(model, ROWS, PLACES)
        assert watch.max_logits
