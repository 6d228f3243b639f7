"""Sizes of zero and below are one sentence in every public function, before anything is computed."""

import inspect

import pytest
import torch
from tiny import problems, tiny_champion, tiny_lm, tiny_quiet_star

import qs_lib as qs

PARTS = {}


def part(name):
    """Models and inputs that no call changes, made once."""
    if not PARTS:
        model, tokenizer = tiny_quiet_star()
        ids = torch.tensor([tokenizer.encode("ben has 9 pens . how many pens ?")])
        PARTS.update(model=model, tokenizer=tokenizer, ids=ids, logits=model.lm(ids).logits.detach())
        PARTS.update(thoughts=model.think(ids), champion=tiny_champion())
    return PARTS[name]


def latency(**sizes):
    small = {"positions": (1,), "num_thoughts": (1,), "thought_lengths": (4,), "repeats": 1} | sizes
    return qs.measure_latency(part("model"), small.pop("ids", part("ids")), **small)


def theater(**sizes):
    small = {"num_thoughts": 2, "thought_length": 6} | sizes
    return qs.anti_theater(part("model"), part("tokenizer"), problems()[:3], **small)


def trained(**sizes):
    return qs.train_quiet_star(part("model"), part("tokenizer"), problems(), problems("validation", 2), **sizes)


def baked(**sizes):
    given = problems(size=40), problems("validation", 2)
    return qs.bake(part("model").lm, part("tokenizer"), [], *given, **sizes)


def lines(tmp_path, **sizes):
    (tmp_path / "train.jsonl").write_text('{"question": "a ?", "answer": "#### 2"}\n')
    return qs.load_problems(str(tmp_path / "train.jsonl"), **sizes)


def of_lm(function):
    return lambda _, **sizes: function(part("model").lm, part("ids"), **sizes)


CALLS = {  # what is called, and the sizes that must be above zero
    "difficult_positions": (lambda _, **n: qs.difficult_positions(part("logits"), part("ids"), **n), ["count"]),
    "thought_length": (lambda _, **n: qs.thought_length(**n), ["problem_length"]),
    "load_problems, pocket": (lambda _, **n: qs.load_problems(**n), ["limit"]),
    "load_problems, a file": (lines, ["limit"]),
    "generate_thoughts": (of_lm(qs.generate_thoughts), ["num_thoughts", "thought_length", "max_streams", "top_p"]),
    "think": (lambda _, **n: part("model").think(part("ids"), **n), ["num_thoughts", "thought_length"]),
    "rescore_thoughts": (
        lambda _, **n: qs.rescore_thoughts(part("model").lm, part("ids"), part("thoughts"), **n),
        ["n_true"],
    ),
    "QuietStarConfig": (lambda _, **n: qs.QuietStarConfig(**n), ["num_thoughts", "thought_length", "n_true"]),
    "from_base": (
        lambda _, **n: qs.QuietStarForCausalLM.from_base(tiny_lm()[0], **n),
        ["num_thoughts", "thought_length", "n_true"],
    ),
    "MixingHead": (lambda _, **n: qs.MixingHead(**{"hidden_size": 8} | n), ["hidden_size", "width"]),
    "measure_latency": (
        lambda _, **n: latency(**n),
        ["positions", "num_thoughts", "thought_lengths", "repeats", "target_ms"],
    ),
    "measure_latency, in a list": (
        lambda _, **n: latency(**{name: [2, size] for name, size in n.items()}),
        ["positions", "num_thoughts", "thought_lengths"],
    ),
    "anti_theater": (
        lambda _, **n: theater(**n),
        ["num_thoughts", "thought_length", "batch_size", "n_true", "max_new_tokens"],
    ),
    "train_quiet_star": (
        lambda _, **n: trained(**n),
        ["steps", "batch_size", "num_thoughts", "thought_length", "n_true", "over", "num_positions", "evaluate_every"],
    ),
    "bake": (lambda _, **n: baked(**n), ["epochs", "batch_size", "max_new_tokens"]),
}


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize(("call", "name"), [(call, name) for call, (_, names) in CALLS.items() for name in names])
def test_a_size_that_must_be_above_zero(tmp_path, call, name, size):
    with pytest.raises(ValueError, match=name) as caught:
        CALLS[call][0](tmp_path, **{name: size})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (qs.reasoning_dataset, {"cot": -1}),
        (qs.reasoning_dataset, {"per_strategy": -1}),
        (qs.reasoning_dataset, {"cot": 0, "per_strategy": 0}),
    ],
)
def test_examples_of_a_kind_may_be_none_and_not_fewer(call, sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        call(problems(size=600), **{"per_strategy": 1, "cot": 1} | sizes)
    assert len(call(problems(size=600), cot=0, per_strategy=1)["train"]) == 7


@pytest.mark.parametrize("name", ["temperature", "seed"])
def test_what_may_be_zero_and_not_below(name):
    with pytest.raises(ValueError, match=f"{name}=-1"):
        theater(**{name: -1})


@pytest.mark.parametrize("call", [qs.QuietStarConfig, lambda **n: qs.QuietStarForCausalLM.from_base(tiny_lm()[0], **n)])
def test_a_thought_has_two_tags_and_a_temperature_of_zero_at_least(call):
    assert call(thought_temperature=0.0, thought_length=2) is not None
    for sizes in ({"thought_length": 1}, {"thought_temperature": -0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} is .*; it must be at least"):
            call(**sizes)


def test_an_empty_text_is_one_sentence():
    empty = part("ids")[:, :0]
    with pytest.raises(ValueError, match="tokens is 0; it must be at least 1"):
        latency(ids=empty)
    with pytest.raises(ValueError, match="there is no text to think about: input_ids are missing, empty"):
        part("model")(empty)
    assert part("model").think(empty).tokens.shape[1] == 0  # no position, no thought
    assert qs.difficult_positions(part("logits")[:, :0], empty, count=2).tolist() == [[-1, -1]]


def test_every_public_function_with_a_size_is_among_the_calls():
    """A new function whose signature names a size must be added above."""
    sizes = {"count", "limit", "num_thoughts", "thought_length", "max_streams", "n_true", "repeats", "hidden_size"}
    public = {
        name: value for name, value in vars(qs).items() if callable(value) and value.__module__.startswith("qs_lib")
    }
    plain = {n for n, v in public.items() if not hasattr(v, "__dataclass_fields__") and not hasattr(v, "model_fields")}
    having = {name for name in plain if sizes & set(inspect.signature(public[name]).parameters)}
    assert having <= {call.partition(",")[0] for call in CALLS}
