"""The inspector shows what the model wrote and nothing that it wrote can act; it moves, filters, compares and saves."""

import ast
import gc
import json
import time
import unicodedata
import weakref
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
from hostile import HOSTILE
from ipywidgets import Widget, widgets
from tiny import tiny_quiet_star

from qs_lib.errors import WorkbookError
from qs_lib.evaluation.episodes import Episode, Thought, read_episodes
from qs_lib.viewing import png
from qs_lib.viewing.escape import safe_label, safe_line, safe_option, safe_text, safe_token
from qs_lib.viewing.html import MOST_THOUGHTS, MOST_TOKENS, coloured, heat, helped, overview, render
from qs_lib.viewing.inspector import FILTERS, RESTORED, SORTS, ThoughtInspector
from qs_lib.viewing.pick import has


def thought(utility=1.0, answer="17", tokens=("<think>", " 9", "</think>")):
    return Thought(
        tokens=list(tokens),
        logprobs=[0.0, -1.25, -0.0001][: len(tokens)],
        utility=utility,
        weight=0.25,
        answer=answer,
        coherence={"semantic": 0.5, "syntactic": 0.25, "predictive": 1.0, "composite": 0.575},
        next_tokens=[(answer, 0.9), ("3", 0.1)],
        reward=utility or 0.0,
        advantage=0.5,
    )


def episode(problem=0, answer_with="17", thoughts=None, **changes):
    values = {
        "problem": problem,
        "question": f"how many {problem} ?",
        "answer": "17",
        "family": "chain",
        "difficulty": 2,
        "position": 3,
        "tokens": ["how", "many", "?"],
        "thoughts": [thought(), thought()] if thoughts is None else thoughts,
        "no_thought_weight": 0.5,
        "base_tokens": [("3", 0.7)],
        "mixed_tokens": [("17", 0.8)],
        "answer_without": "3",
        "answer_with": answer_with,
    }
    return Episode(**values | changes)


def invisible(text):
    """Whether ``text`` holds a character that is not printed."""
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.open, self.text = set(), [], ""

    def handle_starttag(self, tag, attrs):
        self.seen |= {tag, *(f"{tag} {name}" for name, _ in attrs)}
        if tag not in ("meta", "hr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def parsed(html):
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    return tags


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(text):
    shown = safe_text(text)
    assert not set(shown) & set("<>\"'") and not invisible(shown) and len(shown) < 20_000
    assert "<" not in safe_token(text) and not invisible(safe_token(text))
    assert parsed(f"<p>{shown}</p>").seen == {"p"}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_steers_no_terminal_and_no_figure(text):
    assert not invisible(safe_line(text).replace("\n", "").replace("\r", "")) and not invisible(safe_label(text))
    assert safe_line("\r\x1b[A 10%\x1b]0;title\x07\n") == "\r\x1b[A 10%\u241b]0;title\u2407\n", "bars still move up"
    assert safe_label("$x_{$") == r"\$x_{\$"


def test_there_are_enough_of_them():
    assert len(HOSTILE) == len(set(HOSTILE)) >= 100


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_a_control_hides_nothing_and_can_be_sent(text):
    shown = safe_option(text)
    shown.encode()  # a lone surrogate would stop the whole message
    assert not invisible(shown) and (shown or not text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_and_tokens_in_the_inspectors_own_controls(text):
    one = episode(0, tokens=[text, text], position=1)
    inspector = ThoughtInspector({"": [one], text or "other": [one]})
    labels = [label for control in (inspector.strip, inspector.beside) for label, _ in control.options]
    assert len(labels) == len(set(labels)) == 4 and max(map(len, labels)) < 300
    for label in labels:
        label.encode()
        assert not invisible(label)


def test_marks_and_spaces_that_print_nothing_are_named():
    assert safe_text("a\u3164\u00a0\ufe0f\U000e0041") == "a[U+3164][U+00A0][U+FE0F][U+E0041]"
    assert safe_text("e\u0301\u0301\u0301\u0301\u0301 e\u0301") == "e\u0301\u0301\u0301[2 more marks] e\u0301"


def test_text_is_shown_as_it_is():
    assert parsed(safe_text("<think> a & b")).text == "<think> a & b"
    assert safe_text("\x1b[0m\n") == "\u241b[0m\u21b5" and safe_text("\u202e") == "[U+202E]"
    assert safe_text("x" * 1_000_000, 10) == "x" * 10 + "\u2026 [999,990 more characters]"
    assert [safe_token(t) for t in ("", " ", " 9")] == ["\u2205", "\u2423", "\u24239"]


def test_a_hostile_episode_adds_no_tag_and_no_attribute():
    clean = parsed(render(episode())).seen
    for text in HOSTILE:
        one = thought(answer=text, tokens=(text, text, text))
        one.next_tokens = [(text, 0.5)]
        bad = episode(
            question=text,
            answer=text,
            family=text,
            stage=text,
            tokens=[text],
            answer_with=text,
            answer_without=text,
            thoughts=[one],
            base_tokens=[(text, 0.5)],
            mixed_tokens=[(text, 0.5)],
        )
        started = time.process_time()
        found = parsed(render(bad))
        assert time.process_time() - started < 1, "one text must not freeze the page"
        assert found.seen <= clean and not invisible(found.text.replace("\n", ""))
        assert parsed(ThoughtInspector([bad]).static_html()).seen <= clean | {"div"}


def test_everything_is_said_in_words_and_numbers():
    text = parsed(render(episode())).text
    for part in (
        "-1.25",
        "composite",
        "0.57",
        "semantic",
        "0.50",
        "mixing weight",
        "0.25",
        "helped (+1.00 nats)",
        "17 0.900",
        "without thoughts",
        "after thought 2",
        "mixed",
        "0.800",
        "right",
        "wrong",
        "reward 1.00",
        "chain",
    ):
        assert part in text, part
    assert "-0.00" not in text
    assert "hurt (-1.00 nats)" in parsed(render(episode(thoughts=[thought(-1.0)]))).text
    assert "made no difference" in parsed(render(episode(thoughts=[thought(0.0)]))).text


def test_a_page_stays_small_whatever_the_model_wrote():
    huge = thought(tokens=["a" * 1_000_000] * 3)
    long = Thought(tokens=["a"] * 100_000, logprobs=[-1.0] * 100_000)
    html = render(episode(question="b" * 1_000_000, thoughts=[huge, long]))
    assert len(html) < 100_000 and f"{100_000 - MOST_TOKENS} more tokens" in html
    assert "more thoughts" in render(episode(thoughts=[thought()] * (MOST_THOUGHTS + 2)))


def test_bare_episodes_render():
    bare = Episode(problem=1, question="", answer="", position=0, tokens=[], thoughts=[])
    assert parsed(render(bare)) and helped(bare) == 0
    assert not FILTERS["thoughts disagree"]([bare]) and FILTERS["right"]([bare])
    assert parsed(overview([bare]))


def test_filters():
    episodes = [
        episode(0),
        episode(1, "3", [thought(-2.0), thought(-1.0, "3")]),
        episode(2, thoughts=[thought(5.0)]),
        episode(3, "3", [thought(-3.0)]),
    ]
    chosen = {name: [e.problem for e in pick(episodes)] for name, pick in FILTERS.items()}
    assert chosen == {
        "all": [0, 1, 2, 3],
        "wrong": [1, 3],
        "right": [0, 2],
        "thoughts disagree": [1],
        "most helped": [2, 0],
        "most hurt": [3, 1],
    }


def test_a_problem_without_a_truth_is_neither_right_nor_wrong():
    unknown = episode(0, answer=None, thoughts=[thought(None)])
    assert not FILTERS["right"]([unknown]) and not FILTERS["wrong"]([unknown]) and FILTERS["all"]([unknown])
    table = parsed(overview([unknown])).text
    assert "not known" in table and "wrong" not in table.replace("outcome", "") and "right" not in table


def test_orders():
    episodes = [
        episode(0, difficulty=1, thoughts=[thought(0.0), thought(0.0, "3")]),
        episode(1, difficulty=3, thoughts=[thought(2.0)]),
        episode(2, difficulty=2, thoughts=[]),
    ]
    inspector = ThoughtInspector(episodes)
    orders = {}
    for name in SORTS:
        inspector.sort.value = name
        orders[name] = [e.problem for e in inspector.shown]
    assert orders == {
        "as chosen": [0, 1, 2],
        "utility, best first": [1, 0, 2],
        "coherence, best first": [0, 1, 2],
        "hardest first": [1, 2, 0],
        "most different answers first": [0, 1, 2],
    }
    inspector.filter.value, inspector.sort.value = "most helped", "as chosen"
    assert [e.problem for e in inspector.shown] == [1]


def test_tokens_of_saved_episodes_can_be_stepped_through():
    early = episode(0, position=1, tokens=["how", "many"], stage="early")
    inspector = ThoughtInspector([episode(0, position=2), early])
    assert inspector.strip.options == (("0 how", 0), ("1 many", 1), ("2 ?", 2)) and inspector.strip.value == 2
    inspector.token.value = 0
    assert inspector.strip.value == 0 and "No thoughts were saved at this token" in inspector.view.value
    inspector.strip.value = 1
    assert inspector.token.value == 1 and "stage early" in inspector.view.value
    inspector.next.click()
    assert inspector.token.value == 1 == inspector.token.max and "stage early" in inspector.view.value


def test_saved_from_the_button(tmp_path, monkeypatch):
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    inspector = ThoughtInspector([episode(0)])
    for given, name in (
        ("mine.html", "mine.html"),
        ("../../x<b>.html", "x_b_.html"),
        ("/", "thoughts.html"),
        (".x", "x"),
    ):
        inspector.file.value = given
        inspector.save.click()
        assert (tmp_path / "inspector" / name).is_file() and f"inspector/{name}" in inspector.status.value
    assert [p.name for p in tmp_path.iterdir()] == ["inspector"] and not (tmp_path.parent / "x_b_.html").exists()
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path / "inspector" / "x"))
    inspector.save.click()
    assert "saved as" not in inspector.status.value and inspector.status.value


def test_moving_and_choosing():
    inspector = ThoughtInspector([episode(i, "17" if i % 2 else "3") for i in range(6)])
    assert inspector.current.problem == 0 and "how many 0" in inspector.view.value
    assert inspector.previous.disabled and not inspector.next.disabled
    inspector.next.click()
    assert inspector.index.value == 2 and "how many 1" in inspector.view.value
    inspector.index.value = 6
    assert inspector.next.disabled and "6 of 6" in inspector.count.value
    inspector.step(99)
    assert inspector.index.value == 6
    inspector.filter.value = "wrong"
    assert inspector.index.max == 3 and inspector.current.problem == 0 and "1 of 3" in inspector.count.value
    inspector.filter.value = "thoughts disagree"
    assert (
        inspector.current is None and "No problem matches" in inspector.view.value and "0 of 0" in inspector.count.value
    )
    inspector.filter.value = "all"
    assert inspector.current.problem == 0


def test_two_checkpoints_of_one_question():
    baked, trained = [episode(0, "3"), episode(1, "3")], [episode(0)]
    inspector = ThoughtInspector({"baked": baked, "after <RL>": trained})
    text = parsed(inspector.view.value).text
    assert "baked" in text and "after <RL>" in text
    inspector.index.value = 2
    assert "not among its episodes" in inspector.view.value
    inspector.beside.value = ""
    assert "not among" not in inspector.view.value and "RL" not in inspector.view.value


def test_static_twin_and_page(tmp_path, monkeypatch):
    inspector = ThoughtInspector([episode(i) for i in range(60)])
    outputs = []
    monkeypatch.setattr("qs_lib.viewing.inspector.display", lambda data, raw: outputs.append(data))
    inspector._ipython_display_()
    live, twin = outputs
    assert live["text/plain"] == "ThoughtInspector(60 episodes)" and "text/html" not in live
    assert "application/vnd.jupyter.widget-view+json" in live and len(twin) == 2
    assert inspector.current_html() in twin["text/html"] and "and 10 more" in twin["text/html"]
    assert parsed(twin["text/html"])
    page = inspector.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "how many 59" in page and "http" not in page and "<script" not in page


def test_reads_a_file_and_refuses_nothing(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text("\n".join(e.model_dump_json() for e in (episode(0), episode(1))))
    assert len(ThoughtInspector(path).episodes) == 2
    with pytest.raises(ValueError, match="nothing to inspect"):
        ThoughtInspector([])


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d\x0be\rf\ng", "\ud800", "\udfff\ud800"])
def test_an_episode_of_any_text_is_read_as_it_was_written(tmp_path, text):
    one, path = episode(question=text, thoughts=[thought(answer=text)]), tmp_path / "episodes.jsonl"
    plain = not any("\ud800" <= c <= "\udfff" for c in text)  # else it can only be written with escapes
    line = one.model_dump_json() if plain else json.dumps(one.model_dump())
    path.write_bytes(f"{line}\n{line}\r\n".encode())
    assert read_episodes(path) == [one, one]
    path.write_bytes(b"")
    assert read_episodes(path) == []
    path.write_bytes(f"{line}\n{'[' * 100_000}".encode())
    with pytest.raises(WorkbookError, match="episodes.jsonl:2 is not an episode"):
        read_episodes(path)


def test_ten_thousand_episodes_open_and_move_quickly():
    episodes = [episode(i) for i in range(10_000)]
    started = time.process_time()
    inspector = ThoughtInspector(episodes)
    opened = time.process_time() - started
    started = time.process_time()
    inspector.index.value = 9_000
    moved = time.process_time() - started
    assert opened < 2 and moved < 0.3


def test_a_thought_drawn_twice_is_written_out_once():
    shown = parsed(
        render(
            episode(thoughts=[thought(), thought(answer="3"), thought(), thought(tokens=("<think>", " 8", "</think>"))])
        )
    ).text
    assert "Thought 3word for word thought 1170.250.57" in shown and shown.count("word for word") == 1
    assert shown.count("composite") == 3 and shown.count("after thought") == 4


def test_controls_stand_on_two_lines():
    model, tokenizer = tiny_quiet_star()
    for inspector, names in (
        (ThoughtInspector([episode()]), ["Filter", "Order", "Tokens", "Save"]),
        (ThoughtInspector(of_training()), ["Filter", "Order", "Steps", "Compare", "Tokens", "Save"]),
        (
            ThoughtInspector({"a": [episode()], "b": [episode()]}, {"a": model}, tokenizer),
            ["Filter", "Order", "Compare", "Tokens", "Draw", "Edit", "Own text", "Save"],
        ),
    ):
        assert len(inspector.children) == 3 and inspector.children[-1] is inspector.view
        assert sorted(inspector.panel.options) == sorted(names)
        for name in names:
            inspector.panel.value = name
            assert inspector.line.children == (*inspector.groups[name], inspector.status)


def test_a_thought_is_one_row_and_its_numbers_open_on_demand():
    html = render(episode(thoughts=[thought(tokens=("<think>", " <9", "</think>")), thought(answer="3")]))
    rows = [row.partition("</tr>")[0] for row in html.split("<tr>") if "<th scope='row'>Thought" in row]
    assert len(rows) == 2 and all(row.count("<summary>") == 1 for row in rows)
    closed = rows[0].partition("<summary>")[2].partition("</summary>")
    assert parsed(f"<p>{closed[0]}</p>").text == "<think> <9</think>" and closed[0].count("background:rgba") == 3
    assert "-1.25" in closed[2] and "semantic 0.50" in closed[2] and "-1.25" not in closed[0]
    assert "<details><summary>Next token</summary>" in html and "<details open" not in html


# Steps of training, search, colours, a view that is opened again ------------------------------------------------------


def of_training(steps=(100, 0, 20)):
    """Two problems at each step: the first is right from step 20 on, the second never."""
    return [
        episode(n, "17" if n == 0 and s >= 20 else "3", [thought(s / 50 - 1)] * 2, step=s, stage="RL")
        for s in steps
        for n in (0, 1)
    ]


def test_training_is_gone_through_step_by_step():
    inspector = ThoughtInspector(of_training())
    labels = [label for label, _ in inspector.front.options]
    assert labels == ["step 0", "step 20", "step 100"] and inspector.groups["Steps"] == (inspector.front,)
    assert (inspector.front.value, inspector.beside.value) == ("step 0", "step 100"), "before and after, side by side"
    shown = inspector.view.value
    assert shown.index("<h3>step 0</h3>") < shown.index("-1.00 nats") < shown.index("<h3>step 100</h3>")
    assert "(+1.00 nats)" in shown and "stage RL</span>; step 100; truth" in shown
    inspector.next.click()
    inspector.token.value = 1
    inspector.front.value, inspector.beside.value = "step 20", "step 0"
    shown = inspector.view.value
    assert inspector.current.problem == 1 and inspector.token.value == 1, "problem and token stay"
    assert shown.index("<h3>step 20</h3>") < shown.index("<h3>step 0</h3>") and "step 100" not in shown
    inspector.front.value = "step 0"
    assert inspector.view.value.count("<h3>") == 1, "one step beside itself is shown once"
    assert "<h3>step 0</h3>" in inspector.static_html()
    alike = inspector.current.model_copy(update={"stage": "step 20", "step": 20})
    assert "stage" not in render(alike) and "step 20; truth" in render(alike)


def test_a_filter_is_that_of_the_step_in_front():
    inspector = ThoughtInspector(of_training())
    inspector.filter.value = "wrong"
    inspector.index.value = 2
    counts = []
    for inspector.front.value in ("step 20", "step 100", "step 0"):
        counts.append((len(inspector.shown), inspector.current.problem, inspector.current.step))
    assert counts == [(1, 1, 20), (1, 1, 100), (2, 1, 0)]
    inspector.index.value, inspector.front.value = 1, "step 100"
    assert inspector.current.problem == 1, "the one in view is right there: the first that is not"


def test_steps_of_one_of_several_names_and_one_step_alone():
    inspector = ThoughtInspector({"run <b>": of_training(), "baked": [episode(0)]})
    assert [label for label, _ in inspector.front.options] == [f"step {s} of run <b>" for s in (0, 20, 100)]
    assert [label for label, _ in inspector.beside.options][-1] == "baked" and len(inspector.beside.options) == 5
    assert "step 0 of run &lt;b&gt;" in inspector.view.value
    alone = ThoughtInspector(of_training((20,)))
    assert "Steps" not in alone.groups and "<h3>" not in alone.view.value and "step 20; truth" in alone.view.value
    others = ThoughtInspector({"baked": [episode(0)], "run": of_training()})
    assert "Steps" not in others.groups and others.beside.value == "step 0 of run"


def test_search_looks_into_problems_and_thoughts():
    episodes = [
        episode(0, question="Ana has cups"),
        episode(1, thoughts=[thought(tokens=("<think>", "step", "9", "</think>"))]),
        episode(2, thoughts=[thought(tokens=("<think>", " STEP", " 9.5", "</think>"))], question="ben <b>has</b> ?"),
    ]
    inspector = ThoughtInspector(episodes)
    found = {}
    for inspector.search.value in ("", "ANA", "step 9", "Step 9.5", "</B>", ".", "zorp", "9.5\nben"):
        found[inspector.search.value] = [e.problem for e in inspector.shown]
    assert found == {
        "": [0, 1, 2],
        "ANA": [0],
        "step 9": [1, 2],
        "Step 9.5": [2],
        "</B>": [2],
        ".": [2],
        "zorp": [],
        "9.5\nben": [],
    }
    inspector.search.value = "<b>zorp"
    assert "No problem matches &quot;all&quot; and has &quot;&lt;b&gt;zorp&quot;" in inspector.view.value
    inspector.search.value, inspector.filter.value = "step", "most hurt"
    assert inspector.current is None and not has(episode(), "step")


def test_colours_of_a_text_by_hand():
    # the largest is half opaque, others in proportion: 2/4/2 and 1/4/2
    assert heat("entropy", {0: 4.0, 3: 2.0, 5: 0.0}) == {
        0: "rgba(213,94,0,0.50)",
        3: "rgba(213,94,0,0.25)",
        5: "rgba(213,94,0,0.00)",
    }
    assert heat("gain", {1: 1.0, 2: -4.0}) == {1: "rgba(0,114,178,0.12)", 2: "rgba(213,94,0,0.50)"}
    assert heat("gain", {}) == {} and heat("entropy", {0: 0.0}) == {0: "rgba(213,94,0,0.00)"}
    html = coloured(["<b>", " x", "y"], "gain", {0: -2.0, 1: 1.0})
    assert html == (
        "gain after each token (nats): <span style='background:rgba(213,94,0,0.50)'>&lt;b&gt; <i>-2.00</i></span> "
        "<span style='background:rgba(0,114,178,0.25)'>\u2423x <i>1.00</i></span> <span style='background:none'>y</span>"
    )
    for text in HOSTILE:
        assert parsed(f"<p>{coloured([text], text, {0: 1.0})}</p>").seen <= {"p", "span", "span style", "i"}


def test_tokens_have_the_gain_of_the_thoughts_that_were_drawn_there():
    early = episode(0, position=1, tokens=["how", "many"], thoughts=[thought(-2.0)])
    inspector = ThoughtInspector([episode(0, position=2), early])
    assert inspector.colour.options == ("gain",), "entropy needs a model"
    assert "rgba(0,114,178" not in inspector.view.value + inspector.count.value
    inspector.panel.value = "Tokens"
    html = "many <i>-2.00</i></span> <span style='background:rgba(0,114,178,0.25)'>? <i>1.00</i>"
    assert html in inspector.view.value and html in inspector.static_html() and "<details open>" in inspector.view.value
    rules = inspector.count.value.partition("<style>")[2]
    assert "nth-child(2) { background: rgba(213,94,0,0.50) }" in rules and "nth-child(1)" not in rules
    assert "nth-child(3) { background: rgba(0,114,178,0.25) }" in rules
    assert rules.split()[0].removeprefix(".") in inspector.strip._dom_classes
    inspector.panel.value = "Filter"
    assert "<i>-2.00</i></span>" not in inspector.view.value


def test_a_view_is_opened_again_from_its_line():
    inspector = ThoughtInspector(of_training())
    changes = {"front": "step 20", "filter": "wrong", "sort": "hardest first", "search": "Many"}
    changes |= {"beside": "", "index": 1, "token": 2}
    for name, value in changes.items():
        getattr(inspector, name).value = value
    line = inspector.view_line()
    assert line == inspector.link.value and inspector.link in inspector.groups["Save"]
    call = ast.parse(line, mode="eval").body
    assert ast.unparse(call.func) == "qs.ThoughtInspector" and call.args[0].value is ...
    view = ast.literal_eval(call.keywords[0].value)
    assert view == changes and tuple(view) == RESTORED
    again = ThoughtInspector(of_training(), view=view)
    assert again.current_html() == inspector.current_html() and again.static_html() == inspector.static_html()
    assert again.view_line() == line


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_search_is_in_the_line_as_text(text):
    inspector = ThoughtInspector({"": [episode(0, question=text)], text or "x": [episode(0, question=text)]})
    inspector.search.value = text[:1000]
    line = inspector.view_line()
    assert line.isascii() and line.isprintable() and "No problem" not in inspector.view.value
    view = ast.literal_eval(ast.parse(line, mode="eval").body.keywords[0].value)
    assert view["search"] == text[:1000] and view["beside"] == (text or "x")


@pytest.mark.parametrize(
    ("view", "sentence"),
    [
        ({"colour": "gain"}, "a view has no 'colour', only front, filter"),
        ({1: 2}, "a view has no 1"),
        ({"filter": "worst"}, "the view's filter 'worst' is not"),
        ({"front": "step 7"}, "the view's front 'step 7' is not"),
        ({"index": 9}, "the view's index 9 is not"),
        ({"index": "x"}, "the view's index 'x' is not"),
        ({"search": None}, "the view's search None is not"),
        ({"search": "zorp", "index": 2}, "the view's index 2 is not"),
    ],
)
def test_a_view_that_is_not_of_these_episodes_is_one_sentence(view, sentence):
    Widget.close_all()
    with pytest.raises(WorkbookError, match=sentence) as error:
        ThoughtInspector(of_training(), view=view)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 and not registered()


def test_dots_that_were_left_in_a_copied_line_are_named():
    with pytest.raises(WorkbookError, match="put your own episodes"):
        ThoughtInspector(..., view={"index": 1})


def test_the_page_that_is_saved_begins_with_the_view_and_is_escaped(tmp_path):
    inspector = ThoughtInspector({"<script>": of_training()}, view={"front": "step 20 of <script>", "search": "how"})
    inspector.panel.value = "Tokens"
    page = inspector.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert inspector.current_html() in page and "<script" not in page and "http" not in page
    assert "step 20 of &lt;script&gt;" in page and parsed(page.partition("<body")[2].partition(">")[2][:-14])


# What a closed inspector leaves behind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        lambda model: {"episodes": [episode()], "model": model},
        lambda model: {"model": model},
        lambda model: {"episodes": {"a": [episode()], "b": [episode()]}, "model": {"a": model, "b": model}},
        lambda model: {"episodes": {"a": [episode()]}, "model": {"b": model}},
    ],
)
@pytest.mark.parametrize("close", [lambda i: i.close(), lambda i: (i.close(), i.close()), lambda i: Widget.close_all()])
def test_a_closed_inspector_lets_its_models_go(given, close):
    Widget.close_all()
    model, tokenizer = tiny_quiet_star()
    inspector, alive = ThoughtInspector(**given(model), tokenizer=tokenizer), weakref.ref(model)
    inspector.read("ben has 9 pens .")
    inspector.think()
    close(inspector)
    assert not registered()
    del inspector, model
    gc.collect()
    assert alive() is None


def registered() -> list:
    return list(widgets.widget._instances.values())


def test_a_closed_inspector_still_shows_what_it_showed_and_draws_no_more(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    inspector, shown = ThoughtInspector([episode()], model, tokenizer), []
    before = inspector.static_html()
    inspector.close()
    monkeypatch.setattr("qs_lib.viewing.inspector.display", lambda bundle, **_: shown.append(bundle))
    inspector._ipython_display_()
    assert [bundle["text/html"] for bundle in shown] == [before]
    with pytest.raises(WorkbookError, match="give a model"):
        inspector.think()


@pytest.mark.parametrize("broken", ["_make_live_controls", "_rows", "_choose"])
def test_an_inspector_that_cannot_be_made_leaves_no_widget(monkeypatch, broken):
    Widget.close_all()
    monkeypatch.setattr(ThoughtInspector, broken, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ThoughtInspector([episode()])
    assert not registered()


def test_a_view_is_saved_as_a_picture(tmp_path, monkeypatch):
    """Surprising tokens are orange, sure ones are not, and dollar signs are no formulas."""
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path))
    shown = episode(question="a $x$ that \\frac{ costs $5 ?" + " long" * 80)
    inspector = ThoughtInspector([shown])
    inspector.file.value = "view.png"
    inspector._save()
    path = tmp_path / "inspector" / "view.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and "view.png" in inspector.status.value
    heads = [text.split(":")[0] for line in png._lines(shown) for _, text, _ in line if text.startswith("Thought ")]
    assert heads == [f"Thought {k}" for k in range(1, len(shown.thoughts) + 1)]  # as the page counts them

    def orange(one) -> int:
        pixels = plt.imread(png.save_png(one, tmp_path / "one.png"))
        return int((pixels[..., 0] - pixels[..., 2] > 0.1).sum())

    thoughts = {
        p: [t.model_copy(update={"logprobs": [p] * len(t.tokens)}) for t in shown.thoughts] for p in (0.0, -2.0)
    }
    sure, unsure = (orange(shown.model_copy(update={"thoughts": thoughts[p]})) for p in (0.0, -2.0))
    assert sure == 0 and unsure > 500


def test_problems_of_one_question_show_their_own_thoughts():
    seven = thought(answer="7", tokens=("<think>", " first", "</think>"))
    inspector = ThoughtInspector([episode(0, answer_with="7", thoughts=[seven]), episode(0, answer_with="17")])
    assert "first" in inspector.view.value
    inspector.index.value = 2
    assert "first" not in inspector.view.value
    inspector.filter.value = "wrong"
    assert "first" in inspector.view.value and len(inspector.shown) == 1
