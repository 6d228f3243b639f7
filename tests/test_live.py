"""Thoughts drawn on demand are the model's own, at any token of any text; what is not known of them is left out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import problems, tiny_lm, tiny_quiet_star

import qs_lib as qs
from qs_lib.data.batches import answer_batch
from qs_lib.data.tokens import encode_context
from qs_lib.errors import WorkbookError
from qs_lib.evaluation.accuracy import answer_of, replies
from qs_lib.evaluation.episodes import (
    STEPS,
    answers_with,
    as_episodes,
    draw_thoughts,
    score_thoughts,
    text_tokens,
    think_at,
)
from qs_lib.viewing.edit import answer_with, entropies, plain_words, thought_ids
from qs_lib.viewing.html import overview
from qs_lib.viewing.inspector import ThoughtInspector

ROOT = Path(__file__).resolve().parents[1]
MODEL, TOKENIZER = tiny_quiet_star()
SETTINGS = {"num_thoughts": 3, "thought_length": 8}


def saved(problem, seed=0):
    """The episode of a problem as anti-theater makes it."""
    drawn, rows = score_thoughts(MODEL, TOKENIZER, [problem], None, seed=seed, **SETTINGS)
    contexts = [encode_context(TOKENIZER, problem["question"])]
    given = (drawn[0].tokens[:, 0], drawn[0].lengths[:, 0])
    answers = {
        name: answers_with(MODEL, TOKENIZER, contexts, *given, weights, 6)
        for name, weights in (("own", "head"), ("none", "none"))
    }
    return as_episodes(TOKENIZER, [problem], drawn, rows, answers, "live")[0]


@pytest.mark.parametrize("number", range(3))
def test_after_a_question_it_is_the_episode_that_would_have_been_saved(number):
    problem = problems()[number]
    live = think_at(MODEL, TOKENIZER, problem["question"], None, problem["answer"], **SETTINGS)
    expected = saved(problem)
    assert live.model_dump(exclude={"family", "difficulty"}) == expected.model_dump(exclude={"family", "difficulty"})


def test_in_the_middle_the_rest_of_the_text_is_the_truth():
    text = problems()[0]["question"]
    words = text_tokens(TOKENIZER, text)
    one = think_at(MODEL, TOKENIZER, text, 4, "17", n_true=2, **SETTINGS)
    assert one.position == 4 and one.tokens == words[:5]
    assert one.answer == "".join(words[5:7]).strip().removesuffix(".").strip() != ""
    # one thought's utility by hand: two plain passes
    thought = one.thoughts[0]
    ids = encode_context(TOKENIZER, text)
    own = [TOKENIZER.convert_tokens_to_ids(t.strip()) for t in thought.tokens]

    def score(before):
        logits = MODEL.lm(torch.tensor([before + ids[5:7]])).logits[0].float()
        logits[:, MODEL.config.hidden_ids] = -torch.inf
        log_probs = logits.log_softmax(-1)
        return sum(log_probs[len(before) - 1 + i, ids[5 + i]].item() for i in range(2))

    with torch.no_grad():
        assert thought.utility == pytest.approx(score(ids[:5] + own) - score(ids[:5]), abs=1e-4)


def test_the_thoughts_never_see_what_follows():
    text = problems()[0]["question"]
    first = think_at(MODEL, TOKENIZER, text, 4, "17", **SETTINGS)
    other = think_at(MODEL, TOKENIZER, " ".join(text.split()[:4]) + " nuts nuts nuts", 4, "3", **SETTINGS)
    assert first.tokens == other.tokens and first.question != other.question
    for a, b in zip(first.thoughts, other.thoughts, strict=True):
        assert (a.tokens, a.coherence, a.next_tokens, a.weight) == (b.tokens, b.coherence, b.next_tokens, b.weight)
        assert a.utility != b.utility


def test_a_text_without_a_truth():
    one = think_at(MODEL, TOKENIZER, "ana has 3 cups", **SETTINGS)
    assert one.answer is None and all(t.utility is None and not t.reward for t in one.thoughts)
    shown = ThoughtInspector([one]).view.value
    assert "truth: <b>not known</b>" in shown and "nats" not in shown and "right" not in shown and "wrong" not in shown
    assert qs.Episode.model_validate_json(one.model_dump_json()) == one


def test_the_two_answers_are_the_plain_one_and_the_mixed_one():
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, 1.0)  # only thoughts count
    differ = 0
    for problem in problems()[:6]:
        question = problem["question"]
        one = think_at(model, tokenizer, question, **SETTINGS)
        plain = replies(model.lm, tokenizer, [question], 6, tuple(model.config.hidden_ids))[0]
        assert one.answer_without == answer_of(tokenizer, plain) and one.no_thought_weight == 0
        single = think_at(model, tokenizer, question, num_thoughts=1, thought_length=8)
        assert single.answer_with == single.thoughts[0].answer
        differ += one.answer_with != one.answer_without
    assert differ


def test_settings_count():
    text = "ana has 3 cups"
    drawn = [
        think_at(MODEL, TOKENIZER, text, seed=s, num_thoughts=k, thought_length=n, temperature=t)
        for s, k, n, t in ((0, 2, 5, 1.0), (1, 2, 5, 1.0), (0, 2, 5, 0.0), (0, 3, 9, 1.0))
    ]
    thoughts = [[t.tokens for t in one.thoughts] for one in drawn]
    assert thoughts[0] != thoughts[1] and thoughts[2][0] == thoughts[2][1]
    assert [len(t) for t in thoughts] == [2, 2, 2, 3] and max(map(len, thoughts[0])) <= 5
    assert think_at(MODEL, TOKENIZER, text, num_thoughts=2, thought_length=5) == drawn[0], (
        "the same seed, the same thoughts"
    )


def test_progress_names_every_step():
    told = []
    think_at(MODEL, TOKENIZER, "ana has 3 cups", progress=lambda *step: told.append(step), **SETTINGS)
    assert told == [(i, len(STEPS), what) for i, what in enumerate((*STEPS, "done"))]


@pytest.mark.parametrize("steps", [STEPS[:-1], (*STEPS, "tidying")])
def test_the_steps_that_are_named_are_those_that_are_taken(steps, monkeypatch):
    monkeypatch.setattr("qs_lib.evaluation.episodes.STEPS", steps)
    with pytest.raises(ValueError, match="values to unpack"):
        think_at(MODEL, TOKENIZER, "ana has 3 cups", **SETTINGS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": " "}, "no text"),
        ({"text": "ana " * 500}, "500|501"),
        ({"text": "a" * 1_000_000}, "1,000,000 characters"),
        ({"position": 99}, "0 to 4"),
        ({"position": -1}, "0 to 4"),
        ({"model": None}, "QuietStarForCausalLM"),
        ({"model": "lm"}, "from_base"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(change, sentence):
    given = {"model": MODEL, "text": "ana has 3 cups"} | change
    if change.get("model") == "lm":
        given["model"] = tiny_lm()[0]
    with pytest.raises(ValueError, match=sentence) as error:
        think_at(tokenizer=TOKENIZER, **given)
    assert len(str(error.value)) < 200


def live_inspector(**settings):
    inspector = ThoughtInspector([saved(p) for p in problems()[:3]], MODEL, TOKENIZER, **settings)
    inspector.thoughts.value, inspector.length.value = 2, 6
    return inspector


def test_the_inspector_draws_at_the_chosen_token():
    inspector = live_inspector()
    last = inspector.token.value
    assert last == inspector.token.max == inspector.current.position == inspector.strip.value
    inspector.strip.value = 3  # what a click does
    assert inspector.token.value == 3 and "No thoughts have been drawn here" in inspector.view.value
    assert "0 &lt;" in inspector.view.value.replace("&lt;bos", "0 &lt;") and len(inspector.strip.options) == last + 1
    inspector.draw.click()
    assert inspector.view.value.count("tokens of thought") == 2 and "drawn with seed 0" in inspector.status.value
    assert inspector.seed.value == 1 and inspector.bar.value == 0 and not inspector.draw.disabled
    assert "seed 0" in inspector.view.value
    before = inspector.view.value
    inspector.draw.click()
    assert inspector.view.value != before, "another draw takes another seed"
    inspector.token.value = last
    assert inspector.strip.value == last and inspector.view.value.count("tokens of thought") == 3, (
        "the saved ones are kept"
    )
    inspector.next.click()
    inspector.previous.click()
    inspector.token.value = 3
    assert inspector.view.value.count("tokens of thought") == 2, "and so are the drawn ones"


def test_thoughts_drawn_for_a_problem_are_those_of_table_and_filters():
    inspector = ThoughtInspector([], MODEL, TOKENIZER)
    inspector.thoughts.value, inspector.length.value = 2, 6
    inspector.read(problems()[0]["question"], "17")
    inspector.think()
    (known,) = inspector.episodes
    assert len(known.thoughts) == 2 and known is inspector.current and known.answer_with
    said = "right" if known.answer_with == "17" else "wrong"
    inspector.filter.value = said
    assert [e is known for e in inspector.shown] == [True]
    assert known.answer_with in overview(inspector.shown, 5)


def test_a_text_of_ones_own():
    inspector = live_inspector()
    inspector.filter.value, inspector.sort.value = "right", "hardest first"
    inspector.own_text.value, inspector.own_truth.value = "ana has 3 cups", "4"
    inspector.read_own.click()
    assert inspector.filter.value == "all" and inspector.index.value == 4 == inspector.index.max
    inspector.draw.click()
    assert "own text" in inspector.view.value and "truth: <b>4</b>" in inspector.view.value
    inspector.own_text.value, inspector.own_truth.value = "ben has 3 cups", ""
    inspector.read_own.click()
    inspector.draw.click()
    assert "truth: <b>not known</b>" in inspector.view.value
    inspector.own_text.value = "  "
    inspector.read_own.click()
    assert "at least one word" in inspector.status.value and inspector.index.max == 5


def test_only_a_model_and_no_episode():
    inspector = ThoughtInspector(model=MODEL, tokenizer=TOKENIZER)
    assert "write a text" in inspector.view.value
    inspector.draw.click()
    assert "nothing to draw" in inspector.status.value
    inspector.read("ana has 3 cups")
    assert len(inspector.think()) == 1 and "Thought 1" in inspector.view.value


def test_two_live_checkpoints_are_compared():
    other = tiny_quiet_star(seed=1)[0]
    inspector = ThoughtInspector({"one": [saved(problems()[0])]}, {"one": MODEL, "two": other}, TOKENIZER)
    assert "'qs-pair'" in inspector.view.value and "<h3>two</h3>" in inspector.view.value
    drawn = inspector.think()
    assert [e.stage.split()[0] for e in drawn] == ["one", "two"]
    assert [t.tokens for t in drawn[0].thoughts] != [t.tokens for t in drawn[1].thoughts]
    inspector.beside.value = ""
    assert "'qs-pair'" not in inspector.view.value and len(inspector.think()) == 1


def test_errors_of_a_draw_are_shown_and_leave_the_inspector_working():
    inspector = live_inspector()
    inspector.length.value = 256
    inspector.draw.click()
    assert "tokens and the model reads" in inspector.status.value and not inspector.draw.disabled
    inspector.length.value = 6
    inspector.draw.click()
    assert "drawn" in inspector.status.value
    with pytest.raises(ValueError, match="needs its tokenizer"):
        ThoughtInspector(model=MODEL)
    foreign = saved(problems()[0]).model_copy(update={"tokens": ["another", "tokenizer"], "position": 1})
    inspector = ThoughtInspector([foreign], MODEL, TOKENIZER)
    inspector.draw.click()
    assert "reads this text otherwise" in inspector.status.value


# A thought that was edited ------------------------------------------------------------------------------------------


def plain_answer(model, tokenizer, question, words, answer):
    """Answer, probability of the truth and five likeliest next tokens by plain passes over the text and a thought."""
    body = [tokenizer.convert_tokens_to_ids(w) for w in words]
    before = encode_context(tokenizer, question) + body
    truth = answer_batch(tokenizer, [{"question": question, "answer": answer}])[0][0].tolist()
    truth = truth[len(before) - len(body) :][:4]

    def log_probs(ids):
        logits = model.lm(torch.tensor([ids])).logits[0].float()
        logits[:, model.config.hidden_ids] = -torch.inf
        return logits.log_softmax(-1)

    with torch.no_grad():
        after = log_probs(before + truth)
        probability = sum(after[len(before) - 1 + i, token] for i, token in enumerate(truth)).exp().item()
        values, top = log_probs(before)[-1].exp().topk(5)
        written = []
        while len(written) < 6 and tokenizer.eos_token_id not in written:
            written.append(log_probs(before + written)[-1].argmax().item())
    written = [i for i in written if i != tokenizer.eos_token_id]
    return answer_of(tokenizer, written), probability, [tokenizer.decode([i]) for i in top], values.tolist()


@pytest.mark.parametrize("number", range(4))
def test_an_edited_thought_is_read_as_plain_passes_read_it(number):
    problem = problems()[number]
    words = "parts 3 step 9 - 4 = 5"
    made = answer_with(MODEL, TOKENIZER, problem["question"], [words, "9"], answer=problem["answer"])
    ids = (["<think>", "<mece>", "3", "<step>", "9", "-", "4", "=", "5", "</think>"], ["<think>", "9", "</think>"])
    for one, tokens in zip(made, ids, strict=True):
        assert one.tokens == tokens
        answer, truth, top, values = plain_answer(MODEL, TOKENIZER, problem["question"], tokens, problem["answer"])
        assert one.answer == answer and one.truth == pytest.approx(truth, rel=1e-4)
        assert [t for t, _ in one.next_tokens] == top
        assert [p for _, p in one.next_tokens] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("position", [None, 4])
def test_a_thought_that_nobody_edited_is_the_one_that_was_drawn(position):
    problem = problems()[0]
    settings = {"position": position, "answer": problem["answer"]}
    drawn = think_at(MODEL, TOKENIZER, problem["question"], **settings, **SETTINGS)
    made = answer_with(MODEL, TOKENIZER, problem["question"], [t.tokens for t in drawn.thoughts], **settings)
    for one, own in zip(made, drawn.thoughts, strict=True):
        assert (one.tokens, one.answer, one.next_tokens) == (own.tokens, own.answer, own.next_tokens)
        assert one.utility == pytest.approx(own.utility, abs=1e-4)
        assert one.logprobs == pytest.approx(own.logprobs, abs=1e-3) or len(own.tokens) == 8  # closed by force


def test_without_a_truth_there_is_no_probability_of_it():
    one = answer_with(MODEL, TOKENIZER, "ana has 3 cups", ["3"])[0]
    assert one.truth is None and one.utility is None and one.answer


def test_the_committed_model_follows_a_number_that_is_changed():
    model, tokenizer = qs.load_run("")
    saved = qs.read_episodes(ROOT / "outputs" / "pocket" / "06_anti_theater" / "episodes.jsonl")
    moved = 0
    for one in saved[:8]:
        own = one.thoughts[0]
        words = plain_words(" ".join(own.tokens)).split()
        same, other = answer_with(
            model, tokenizer, one.question, [" ".join(words), " ".join([*words[:-1], "7"])], one.position, one.answer
        )
        assert (same.tokens, same.answer, same.next_tokens) == (own.tokens, own.answer, own.next_tokens)
        assert same.utility == pytest.approx(own.utility, abs=1e-3)
        moved += other.answer != same.answer and other.truth < same.truth
    assert moved >= 1


def test_words_become_thinking_tokens_and_back():
    text = "<think><step> 7 - 3 = 4<falsify>4 </think>"
    assert plain_words(text) == "step 7 - 3 = 4 refute 4" == plain_words("think step 7 - 3 = 4 refute 4 done")
    ids = thought_ids(TOKENIZER, text)
    assert ids == thought_ids(TOKENIZER, plain_words(text))
    assert TOKENIZER.convert_ids_to_tokens(ids)[:3] == ["<think>", "<step>", "7"]


BAD_THOUGHTS = [
    ("", "is empty"),
    ("  ", "is empty"),
    ("<think></think>", "is empty"),
    ("9 " * 600, "tokens and the model reads"),
    ("9" * 1_000_000, "1,000,000 characters"),
    ("9 zorp", "does not know the word 'zorp'"),
    ("9 <eos> 9", "does not know the word '<eos>'"),
    ("9 \ud800 zorp", "does not know the word 'zorp'"),
    ("9 done 9", "opens and closes once"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD_THOUGHTS)
def test_a_thought_that_cannot_be_read_is_one_sentence(text, sentence):
    with pytest.raises(WorkbookError, match=sentence) as error:
        answer_with(MODEL, TOKENIZER, "ana has 3 cups", [text])
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_the_inspector_edits_a_thought():
    inspector = live_inspector()
    inspector.panel.value = "Edit"
    assert inspector.line.children[:3] == (inspector.edited, inspector.words, inspector.answer)
    assert [label for label, _ in inspector.edited.options] == ["1", "2", "3"]
    inspector.edited.value = ("", 2)
    tokens = inspector.current.thoughts[1].tokens
    assert inspector.words.value == plain_words(" ".join(tokens))
    before = inspector.view.value
    for text, sentence in BAD_THOUGHTS[:3]:
        inspector.words.value = text
        inspector.answer.click()
        assert sentence in inspector.status.value and inspector.view.value == before and not inspector.edits
    inspector.words.value = "step 9 - 4 = 5"
    inspector.answer.click()
    assert "Thought 2 edited: the answer" in inspector.view.value and "original" in inspector.view.value
    assert "truth's probability" in inspector.view.value and inspector.words.value == "step 9 - 4 = 5"
    original, edited = inspector.edit()
    assert original.tokens == tokens and edited.tokens[1] == "<step>" and "is empty" not in inspector.status.value
    inspector.next.click()
    assert "edited" not in inspector.view.value
    assert inspector.words.value == plain_words(" ".join(inspector.current.thoughts[0].tokens))
    inspector.previous.click()
    assert "Thought 2 edited" in inspector.view.value
    inspector.draw.click()
    assert "edited" not in inspector.view.value, "other thoughts stand there now"


def test_each_of_two_models_answers_with_its_own_thought():
    other = tiny_quiet_star(seed=1)[0]
    inspector = ThoughtInspector({"one": [saved(problems()[0])]}, {"one": MODEL, "two": other}, TOKENIZER)
    assert [label for label, _ in inspector.edited.options] == ["one 1", "one 2", "one 3"]
    inspector.think()
    assert len(inspector.edited.options) == 6
    inspector.edited.value, inspector.words.value = ("two", 1), "9"
    made = inspector.edit()[1]
    question, answer = problems()[0]["question"], problems()[0]["answer"]
    assert (
        made
        == answer_with(
            other,
            TOKENIZER,
            question,
            [inspector.found["two"][question, inspector.token.value].thoughts[0].tokens, "9"],
            answer=answer,
        )[1]
    )
    assert inspector.view.value.index("edited") > inspector.view.value.index("<h3>two</h3>")


# Where the model is unsure, and what it is now beside steps of its training -------------------------------------------


def test_entropy_is_that_of_plain_passes():
    text = problems()[0]["question"]
    ids, found = encode_context(TOKENIZER, text), entropies(MODEL, TOKENIZER, text)
    assert len(found) == len(ids)
    for place in (0, 3, len(ids) - 1):
        with torch.no_grad():
            logits = MODEL.lm(torch.tensor([ids[: place + 1]])).logits[0, -1].double()
        kept = [i for i in range(len(logits)) if i not in MODEL.config.hidden_ids]
        chances = (logits[kept] - logits[kept].logsumexp(0)).exp()
        assert found[place] == pytest.approx(-(chances * chances.log()).sum().item(), abs=1e-5)
    with pytest.raises(WorkbookError, match="at least one word"):
        entropies(MODEL, TOKENIZER, " ")


def test_tokens_have_the_colour_of_the_models_entropy():
    inspector = live_inspector()
    inspector.panel.value = "Tokens"
    known = entropies(MODEL, TOKENIZER, inspector.current.question)
    assert all(f"<i>{value:.2f}</i>" in inspector.view.value for value in known)
    place = known.index(max(known))
    assert f"button:nth-child({place + 1}) {{ background: rgba(213,94,0,0.50) }}" in inspector.count.value
    inspector.token.value = place
    inspector.draw.click()
    assert f"text read up to token {place}" in inspector.view.value and "Thought 2" in inspector.view.value
    inspector.colour.value = "gain"
    gain = inspector.found[""][inspector.current.question, place]
    assert f"<i>{sum(t.utility for t in gain.thoughts) / 2:.2f}</i>" in inspector.view.value
    assert "entropy" not in inspector.view.value


def test_a_model_draws_beside_the_steps_of_its_training():
    steps = [saved(p, seed=s).model_copy(update={"step": s}) for s in (0, 5) for p in problems()[:2]]
    inspector = ThoughtInspector(steps, MODEL, TOKENIZER)
    assert [label for label, _ in inspector.front.options] == ["step 0", "step 5", "now"]
    assert (inspector.front.value, inspector.beside.value) == ("step 0", "step 5") and not inspector.edited.options
    inspector.panel.value = "Tokens"
    assert "entropy of now after each token" in inspector.view.value
    inspector.next.click()
    inspector.search.value = "".join(steps[1].thoughts[0].tokens[1:2]).upper()
    inspector.step(9)
    inspector.draw.click()
    assert inspector.search.value == "", "what it is now has no thought to be found by"
    assert inspector.front.value == "now" and inspector.current.question == problems()[1]["question"]
    assert inspector.found["now"][inspector.current.question, inspector.current.position].step is None
    assert "<h3>now</h3>" in inspector.view.value and "<h3>step 5</h3>" in inspector.view.value
    assert inspector.found["step 0"][inspector.current.question, inspector.current.position] == steps[1]
    inspector.search.value = inspector.words.value.split()[0]
    assert len(inspector.shown) >= 1, "what was drawn here is searched too"
    inspector.read("ana has 3 cups")
    assert inspector.index.value == 3 and len(inspector.think()) == 1


def test_the_bar_fills_while_thoughts_are_drawn():
    inspector = ThoughtInspector({"one": [saved(problems()[0])]}, {"one": MODEL, "two": MODEL}, TOKENIZER)
    inspector.thoughts.value, seen = 2, []
    inspector.bar.observe(lambda change: seen.append((change.new, inspector.bar.layout.visibility)), "value")
    for group in ("Tokens", "Draw"):
        assert inspector.bar in inspector.groups[group] and inspector.draw in inspector.groups[group]
    assert inspector.bar.layout.visibility == "hidden"
    inspector.draw.click()
    steps = 2 * len(STEPS)
    assert seen == [*((n, "visible") for n in range(1, steps + 1)), (0, "hidden")] and inspector.bar.max == steps


def test_nothing_to_edit_is_said():
    inspector = ThoughtInspector(model=MODEL, tokenizer=TOKENIZER)
    inspector.answer.click()
    assert "no thought to edit" in inspector.status.value


def test_drawing_is_what_the_sampler_draws():
    question = problems()[0]["question"]
    drawn = draw_thoughts(MODEL.think, TOKENIZER, [question], seed=5, **SETTINGS)[0]
    live = think_at(MODEL, TOKENIZER, question, seed=5, **SETTINGS)
    text = [["".join(t.tokens).replace(" ", "") for t in live.thoughts]]
    assert [[t.replace(" ", "") for t in row] for row in drawn.to_text(TOKENIZER)[0]] == text


def test_the_inspector_is_exported_and_the_library_works_without_widgets():
    assert qs.ThoughtInspector is ThoughtInspector
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qs.nonsense
    code = (
        "import sys; sys.modules['ipywidgets'] = None\nimport qs_lib as qs\nqs.Episode\n"
        "try:\n    qs.ThoughtInspector\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "the inspector needs ipywidgets: pip install 'quiet-star-workbook[notebooks]'\n", done.stderr


def test_the_consensus_is_over_whole_answers_whatever_their_first_token(monkeypatch):
    """By plain passes: a blank that all answers begin with adds the same to every gain, and tells nothing apart."""
    text = problems()[0]["question"]
    ids, says = encode_context(TOKENIZER, text), [[9, 3], [9, 3], [9, 4, 5]]
    monkeypatch.setattr("qs_lib.evaluation.episodes.written_alone", lambda *given: [says])
    one = think_at(MODEL, TOKENIZER, text, **SETTINGS)

    def log_probs(before, said):
        logits = MODEL.lm(torch.tensor([before + said])).logits[0, len(before) - 1 : -1].float()
        logits[:, MODEL.config.hidden_ids] = -torch.inf
        return logits.log_softmax(-1)[torch.arange(len(said)), said]

    with torch.no_grad():
        for k, thought in enumerate(one.thoughts):
            own = [TOKENIZER.convert_tokens_to_ids(t.strip()) for t in thought.tokens]
            gains = [(log_probs(ids + own, s) - log_probs(ids, s)).clamp(-6, 6).sum().item() for s in says]
            expected = (sum(gains) - gains[k]) / 2 / 12 + 0.5  # unscaled: half and half at no gain, 1 at six nats
            assert thought.coherence["predictive"] == pytest.approx(min(1, max(0, expected)), abs=1e-4)
