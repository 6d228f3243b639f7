"""How a model that was not trained on our prompts is asked: worked examples, and turns of a chat."""

import pytest
import torch
from tiny import problems, tiny_champion, tiny_quiet_star

from qs_lib.champion import build_champion, build_tokenizer, load_champion
from qs_lib.data import strategies
from qs_lib.data.tokens import (
    add_thinking_tokens,
    encode,
    encode_context,
    line_ends,
    marker_spellings,
    thinking_ids,
)
from qs_lib.errors import WorkbookError
from qs_lib.evaluation.accuracy import answer_of, decode_with_thoughts, end_ids, replies
from qs_lib.training import baking

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(chat=False):
    texts = [
        f"user assistant\nAnswer: {p['question']} {strategies.reply((p['fits'] or ['cot'])[0], p)}\n"
        for p in problems(size=200)
    ]
    tokenizer = build_tokenizer("gsm8k", texts, 600)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE if chat else None
    model = build_champion(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=24)
    return add_thinking_tokens(model, tokenizer)


def test_a_prompt_with_examples_is_one_line_each_and_ends_in_the_prompt():
    pool = [{**p, "question": p["question"].replace(" . ", " .\n", 1)} for p in problems(size=200)]
    prompts = strategies.prompts_with(pool, 2)
    assert set(prompts) == set(strategies.PROMPTS)
    for strategy, prompt in prompts.items():
        *examples, last = prompt.split("\n")
        assert len(examples) == 2 and last == strategies.PROMPTS[strategy]
        for line in examples:
            assert line.startswith(f"{last} ") and line.endswith(" .") and " think " in line
            thought = line.split(" think ")[-1].split(" done ")[0]
            assert strategies.strategy_of(thought) == strategy
    asked = strategies.asked({"fits": ["mece"], "question": "a\nb ?"}, prompts)
    assert asked == f"{prompts['mece']} a b ?"
    assert strategies.prompts_with([], 0) == strategies.PROMPTS
    with pytest.raises(WorkbookError, match="0 problems fit cot, its prompt needs 1 worked examples"):
        strategies.prompts_with([], 1)


def test_a_reply_is_one_line(monkeypatch):
    model, tokenizer = byte_level()
    ends, word = line_ends(tokenizer), tokenizer.encode(" step", add_special_tokens=False)
    assert ends and all("\n" in tokenizer.decode([i]) for i in ends)
    written = [[*word, ends[0], *word], [*word, tokenizer.eos_token_id, ends[0]]]
    given = {}

    def generate(input_ids, **settings):
        given.update(settings)
        rows = [row + [word[0]] * (6 - len(row)) for row in written]
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    monkeypatch.setattr(model, "generate", generate)
    assert replies(model, tokenizer, ["a", "b"]) == [word, word]
    assert set(given["eos_token_id"]) == {tokenizer.eos_token_id, *ends}


@pytest.mark.parametrize("named_by", ["generation_config", "a list", "config", "generation_config alone"])
def test_a_reply_ends_where_the_models_own_configuration_says(named_by, monkeypatch):
    model, tokenizer = tiny_quiet_star(num_thoughts=2, thought_length=2)
    ids = {word: tokenizer.encode(word, add_special_tokens=False)[-1] for word in ("17", ".", "?", "leo")}
    end = ids["leo"]
    one, several = {"generation_config alone": end}.get(named_by, [tokenizer.eos_token_id, end]), named_by == "a list"
    for lm in (model, model.lm):
        where = lm.config if named_by == "config" else lm.generation_config
        where.eos_token_id = (*one, ids["?"]) if several else one
    assert end in end_ids(model.lm, tokenizer) and end_ids(model.lm, tokenizer)[0] == tokenizer.eos_token_id
    follows, plain = {ids["?"]: ids["17"], ids["17"]: ids["."], ids["."]: end}, model.lm.forward

    def forward(input_ids=None, **more):  # a model that answers "17 . leo"
        out = plain(input_ids=input_ids, **more)
        for row, last in enumerate(input_ids[:, -1].tolist()):
            out.logits[row, -1] = -9.0
            out.logits[row, -1, follows.get(last, end)] = 9.0
        return out

    monkeypatch.setattr(model.lm, "forward", forward)
    question = "ben has 9 pens . ben finds 8 . how many pens ?"
    (reply,) = replies(model.lm, tokenizer, [question], 9)
    assert reply == [ids["17"], ids["."]] and answer_of(tokenizer, reply) == "17"
    said = iter([ids["17"], ids["."], end, ids["17"]])
    monkeypatch.setattr(model, "mix", lambda *a: torch.eye(len(tokenizer))[[next(said)]])
    thoughts = torch.tensor([[thinking_ids(tokenizer)[:2]] * 2]), torch.tensor([[2, 2]])
    context = encode_context(tokenizer, question)
    assert decode_with_thoughts(model, tokenizer, [context], *thoughts, max_new_tokens=4) == [reply]


def test_the_teacher_reads_the_examples_and_the_student_does_not(monkeypatch):
    model, tokenizer = byte_level()
    pool = problems(size=200)
    prompts = strategies.prompts_with(pool, 1)
    held = problems("validation")[:4]
    plain = tokenizer.encode(" think step 1 + 1 = 2 done 2 .", add_special_tokens=False)
    seen = []
    monkeypatch.setattr(
        baking, "replies", lambda m, t, contexts, *a, **k: seen.extend(contexts) or [plain] * len(contexts)
    )
    items = baking.sample_trajectories(model, tokenizer, held, prompts=prompts)
    think, end = thinking_ids(tokenizer)[:2]
    for p, context, item in zip(held, seen, items, strict=True):
        assert context == strategies.asked(p, prompts) and context.count(" think ") == 1
        assert tokenizer.decode(item.teacher_ids).startswith(tokenizer.bos_token + context)
        assert item.student_ids[: item.student_at[0] + 1] == encode_context(tokenizer, p["question"])
        assert item.targets[0] == think and end in item.targets


def test_with_a_chat_template_a_question_is_a_turn_and_the_markers_are_found():
    _, tokenizer = byte_level(chat=True)
    text = tokenizer.decode(encode_context(tokenizer, "how many ?"))
    assert text == "<|im_start|>user\nhow many ?<|im_end|>\n<|im_start|>assistant\nAnswer:"
    whole = encode(tokenizer, "how many ?", "think step 1 + 1 = 2 done 2 .")
    first = marker_spellings(tokenizer)[thinking_ids(tokenizer)[0]]
    assert whole.ids[whole.start : whole.start + len(first)] == first
    assert tokenizer.decode(whole.ids[: whole.start]) == text


def test_the_template_stays_with_the_champion_or_is_left_out(tmp_path):
    model, tokenizer = byte_level(chat=True)
    for thing in (model, tokenizer):
        thing.save_pretrained(tmp_path / "chat")
    assert load_champion(str(tmp_path / "chat"))[1].chat_template == TEMPLATE
    assert load_champion(str(tmp_path / "chat"), chat_template=False)[1].chat_template is None
    for thing in tiny_champion():
        thing.save_pretrained(tmp_path / "plain")
    with pytest.raises(WorkbookError, match="plain has no chat template: set chat_template to False"):
        load_champion(str(tmp_path / "plain"), chat_template=True)
