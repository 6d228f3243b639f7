"""One model that many threads use at once: replies are those given alone, and the model stays as it was."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_model import open_gate
from tiny import tiny_champion, tiny_quiet_star
from transformers import AutoConfig, AutoModelForCausalLM, TextIteratorStreamer

import qs_lib as qs
from qs_lib.model import QuietStarForCausalLM

WORDS = "ben has 9 pens . tom finds 8 cups and gives 3 to ana how many are left ?".split()


def everything(model):
    """All that a model holds: weights, buffers, configurations, flags and what else its modules remember."""
    tensors = {name: x.clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}
    configs = [{"attention": m.config._attn_implementation} | m.config.to_dict() for m in (model, model.lm)]
    fields = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        for name, module in model.named_modules()
    }
    return tensors, [*configs, model.generation_config.to_dict()], fields, [id(m) for m in model.modules()]


def requests(count):
    draw = random.Random(0)
    for number in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 24))) for _ in range(draw.randint(1, 3))]
        streams = number % 4 == 0
        yield {
            "texts": texts[:1] if streams else texts,
            "think": number % 3 > 0,
            "streams": streams,
            "more": 2 + number % 5,
        }


def answer(model, tokenizer, request):
    """The reply to one request, ids, or the text that came through the stream."""
    batch = tokenizer(request["texts"], return_tensors="pt", padding=True)
    settings = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings |= {"max_new_tokens": request["more"], "do_sample": False, "think": request["think"]}
    if not request["streams"]:
        return model.generate(**settings).tolist()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    writer = threading.Thread(target=model.generate, kwargs=settings | {"streamer": streamer})
    writer.start()
    text = list(streamer)
    writer.join()
    return "".join(text)


def serve(model, tokenizer, count):
    """Answer requests from eight threads, by a model that nothing was asked before, then alone."""
    asked, before = list(requests(count)), everything(model)
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda request: answer(model, tokenizer, request), asked))
    after = everything(model)
    assert before[0].keys() == after[0].keys() and all(torch.equal(x, after[0][name]) for name, x in before[0].items())
    assert before[1:] == after[1:]
    assert together == [answer(model, tokenizer, request) for request in asked]
    return together


def test_two_hundred_requests_from_eight_threads_are_answered_as_alone():
    model, tokenizer = tiny_quiet_star(thought_temperature=0.0, num_thoughts=2, thought_length=5, n_true=2)
    open_gate(model, 0.5)
    assert len({str(reply) for reply in serve(model, tokenizer, 200)}) > 50


@pytest.mark.filterwarnings("ignore:.*cannot share text")
def test_a_recurrent_family_is_served_too():
    tokenizer = tiny_champion()[1]
    shape = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", vocab_size=len(tokenizer), **shape, **ends))
    settings = {"num_thoughts": 2, "thought_length": 5, "thought_temperature": 0.0, "n_true": 2}
    model = QuietStarForCausalLM.from_base(*qs.add_thinking_tokens(lm, tokenizer), **settings)
    open_gate(model, 0.5)
    lm(torch.tensor([[7]]))  # its own first pass sets a flag
    serve(model, tokenizer, 12)


def test_a_training_thread_keeps_its_dropout_while_another_thinks():
    model, tokenizer = tiny_quiet_star(thought_length=5)
    model.train()
    seen = []
    model.lm.model.layers[0].register_forward_hook(lambda module, *_: seen.append((module.training, model.training)))
    model.think(torch.tensor([tokenizer.encode("ben has 9 pens .")]))
    assert seen and set(seen) == {(False, True)}
