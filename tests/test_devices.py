"""Nothing made without a device meets the model's tensors: on a GPU it would lie in the wrong memory.

No GPU is needed to see it. Everything is on the CPU here. The model's tensors, what is made with a ``device`` and what
comes from these is marked. Each operation that mixes marked tensors with others as CUDA would refuse is written down.
"""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import problems, tiny_quiet_star
from torch.overrides import TorchFunctionMode

import qs_lib as qs
from qs_lib.data import batches
from qs_lib.evaluation import accuracy, cheats, episodes, likelihood
from qs_lib.model import QuietStarForCausalLM
from qs_lib.thoughts import checks
from qs_lib.training import baking, reinforce

LIBRARY = str(Path(qs.__file__).parent)
BUDGET = {"num_thoughts": 3, "thought_length": 8}
PROBLEMS = problems("validation", 6)


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def mark(*values):
    for tensor in tensors(values):
        tensor.marked = True


def is_marked(tensor):
    return getattr(tensor, "marked", False)


class Strays(TorchFunctionMode):
    """``found``: operations of qs_lib that a GPU would refuse."""

    def __init__(self):
        self.found = set()

    def __torch_function__(self, function, types, given=(), named=None):
        named, name, out = named or {}, getattr(function, "__name__", ""), function(*given, **(named or {}))
        read = list(tensors((given, named)))
        there = any(map(is_marked, read))
        moves = name in ("to", "copy_")
        if name in ("cpu", "to") and out is given[0]:
            out = out.view_as(out)  # another object, for one may be marked and the other not
        if name == "cpu":
            return out
        if there and not moves and self.refused(name, given, [x for x in read if not is_marked(x) and x.dim()]):
            self.found |= {
                f"{Path(f.filename).name}: {f.line}"
                for f in traceback.extract_stack()
                if f.filename.startswith(LIBRARY)
            }
        if (
            there
            or named.get("device") is not None
            or (moves and any(isinstance(x, (torch.device, str)) for x in given[1:]))
        ):
            mark(out)
        return out

    @staticmethod
    def refused(name, given, here):
        if name == "numpy":
            return True
        if name not in ("__getitem__", "__setitem__") or not is_marked(given[0]):
            return bool(here)
        by_tensor = any(
            isinstance(x, (torch.Tensor, list)) for x in (given[1] if isinstance(given[1], tuple) else given[1:2])
        )
        value = given[2:] if by_tensor else ()  # a slice is copied into from anywhere, and an index may lie anywhere
        return any(x is y for x in here for y in tensors(value))


@pytest.fixture(scope="module")
def models():
    (model, tokenizer), (before, _) = tiny_quiet_star(), tiny_quiet_star(seed=1)
    mark([*model.parameters(), *model.buffers(), *before.parameters(), *before.buffers()])
    model.think(torch.tensor([[5, 6, 7]]), **BUDGET)  # probed once, as a model new to the engine
    return model, before, tokenizer


def thoughts_of(model, tokenizer, think=None):
    ids, mask, at = batches.answer_batch(tokenizer, PROBLEMS)
    return (think or model.think)(ids, mask, at, torch.Generator().manual_seed(0), **BUDGET)


def one_training_step(model, before, tokenizer):
    ids, mask, at = batches.think_where(model.lm, tokenizer, PROBLEMS)
    thoughts = model.think(ids, mask, at, torch.Generator().manual_seed(0), **BUDGET)
    keep = (batches.disagreement(thoughts) + torch.rand(6)).topk(3).indices
    ids, mask, thoughts = ids[keep], mask[keep], thoughts.part(keep)
    settings = reinforce.QuietStarSettings()
    *_, credit = reinforce.quiet_star_loss(model, before.lm, tokenizer, ids, mask, thoughts, settings)
    chosen = reinforce.Rollouts([PROBLEMS[k] for k in keep.tolist()], ids, mask, thoughts)
    reinforce.first_groups(model, tokenizer, chosen, credit, settings, "s")


def baked(model, before, tokenizer):
    plain = tokenizer.encode(" think step 1 + 1 = 2 done 2 .") + [tokenizer.eos_token_id]
    question = PROBLEMS[0]["question"]
    items = [
        baking.thought_item(tokenizer, f"doubt it . {question}", question, plain, ce=True),
        baking.direct_item(tokenizer, question, [5, 6]),
    ]
    baking.baking_loss(model.lm, before.lm, items, tokenizer)
    accuracy.reply_statistics(model.lm, tokenizer, PROBLEMS, 4)


def scored(model, before, tokenizer, weights):
    scale = qs.evaluation.theater.fit_scale(model, tokenizer, PROBLEMS, **BUDGET)
    drawn, _ = qs.evaluation.episodes.score_thoughts(model, tokenizer, PROBLEMS, scale, weights=weights, **BUDGET)
    tokens, lengths = qs.evaluation.attacks.stacked(drawn)
    contexts = [[5, 6, 7]] * len(PROBLEMS)
    rng = np.random.default_rng(0)
    for attack in ("own", "foreign", "shuffled", "filler", "last_step_deleted"):
        given = qs.evaluation.attacks.attacked_thoughts(attack, tokens, lengths, PROBLEMS, tokenizer, rng)
        qs.evaluation.episodes.answers_with(model, tokenizer, contexts, *given, weights, 2)
    qs.evaluation.episodes.written_alone(model, tokenizer, contexts, tokens, lengths, 2)


def planted(model, before, tokenizer):
    honest = {"model": model, "before": before, "tokenizer": tokenizer, "problems": PROBLEMS}
    for cheat in ("copied", "repeated", "leaked"):
        thoughts = thoughts_of(model, tokenizer, cheats.plant(cheat, honest, [])["think"])
        qs.rescore_thoughts(model.lm, batches.answer_batch(tokenizer, PROBLEMS)[0], thoughts)


TEXT = torch.tensor([[3, 4, 5, 6, 7]])
WORK = {
    "thoughts after texts on the CPU": lambda model, before, tokenizer: thoughts_of(model, tokenizer),
    "replies": lambda model, before, tokenizer: accuracy.replies(model.lm, tokenizer, ["a b", "c"], 4, (20, 21)),
    "before and after": lambda model, before, tokenizer: accuracy.measure(
        model, tokenizer, PROBLEMS[:2], PROBLEMS[:2], "thoughts", **BUDGET
    ),
    "scores and attacks, head": lambda *given: scored(*given, "head"),
    "scores and attacks, thoughts alike": lambda *given: scored(*given, "thoughts"),
    "cheats": planted,
    "likelihood": lambda model, before, tokenizer: likelihood.text_log_likelihood(
        model, tokenizer, [batches.text_of(p) for p in PROBLEMS], controls=True, positions=3, **BUDGET
    ),
    "probability of answers": lambda model, before, tokenizer: likelihood.answer_probability(
        model, tokenizer, PROBLEMS, **BUDGET
    ),
    "one by one": lambda model, before, tokenizer: checks.one_by_one(
        model.lm, [3, 4, 5], 8, *model.config.hidden_ids[:2]
    ),
    "largest difference": lambda model, before, tokenizer: checks.largest_difference(
        model.lm, TEXT, model.think(TEXT, **BUDGET)
    ),
    "live": lambda model, before, tokenizer: episodes.think_at(model, tokenizer, PROBLEMS[0]["question"], 3, **BUDGET),
    "one training step": one_training_step,
    "baking": baked,
}


@pytest.mark.parametrize("name", WORK)
def test_nothing_made_without_a_device_meets_the_model(name, models):
    with Strays() as strays, torch.no_grad():
        WORK[name](*models)
    assert strays.found == set()


def test_a_stray_tensor_is_seen(models):
    with Strays() as strays, torch.no_grad():
        model = models[0]
        qs.thoughts.attention.LanguageHead(model.lm)(torch.zeros(1, 32) + 0)
    assert any("self.head(hidden" in line for line in strays.found)


def test_the_head_of_a_wrapped_model_is_where_the_model_is():
    model, tokenizer = tiny_quiet_star()
    wrapped = QuietStarForCausalLM.from_base(model.lm.to("meta"), tokenizer)
    assert {p.device.type for p in wrapped.parameters()} == {"meta"}


def test_visible_keys_are_measured_on_the_cpu():
    model, _ = tiny_quiet_star()
    thoughts = model.think(TEXT, positions=torch.tensor([[2]]), num_thoughts=1, thought_length=3)
    seen, rule, *_ = checks.visible_keys(model.lm.to("meta"), TEXT, thoughts)
    assert torch.equal(seen, rule)
