"""Tables of the notebooks: intervals in one cell, text on the left, and what is said of a gain."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from qs_lib.evaluation.episodes import Episode, Thought
from qs_lib.workbook import figures, tables


def summary(gain, low, high):
    return {"accuracy_baseline": 0.833, "accuracy_with": 0.833 + gain} | {
        "accuracy_gain": gain,
        "accuracy_gain_low": low,
        "accuracy_gain_high": high,
    }


@pytest.mark.parametrize(
    ("gain", "told"),
    [
        ((0.107, 0.085, 0.131), "0.83 -> 0.94 on 24 test problems, +0.11 [+0.09, +0.13]: a gain"),
        ((-0.107, -0.2, -0.01), "0.83 -> 0.73 on 24 test problems, -0.11 [-0.20, -0.01]: a loss"),
        (
            (-0.083, -0.25, 0.083),
            "0.83 -> 0.75 on 24 test problems, -0.08 [-0.25, +0.08]: too few to tell a gain from a loss",
        ),
    ],
)
def test_a_gain_is_told_by_its_interval(gain, told):
    assert tables.gain_told(summary(*gain), 24) == told


def test_an_interval_is_one_cell_and_differences_carry_their_sign():
    columns = {"none": {}, "first": summary(0.1, -0.05, 0.25) | {"steps": 4}, "second": {"accuracy_gain": 0.5}}
    table = tables.side_by_side(columns, 2)
    assert list(table.columns) == ["first", "second"]
    assert list(table.index) == ["accuracy_baseline", "accuracy_with", "accuracy_gain", "steps"]
    assert list(table["first"]) == ["0.83", "0.93", "+0.10 [-0.05, +0.25]", "4"]
    assert list(table["second"]) == ["-", "-", "0.50", "-"]
    named = tables.side_by_side(columns, 2, {"steps": "steps of RL", "other": "other"})
    assert list(named.index) == ["steps of RL", "other"] and list(named["first"]) == ["4", "-"]


def test_a_table_stands_left_in_full_and_escaped():
    html = tables.as_html(pd.DataFrame({"a": ["<b>" + 80 * "x"]}))
    assert "&lt;b&gt;" + 80 * "x" in html and "right" not in html and "text-align: left !important" in html
    assert html.count("<th style='text-align: left'") == 3 and "<td style='text-align: left'>&lt;b" in html


def test_the_name_of_an_index_takes_no_line_of_its_own():
    html = tables.as_html(pd.DataFrame({"id": ["x"], "a": [1]}).set_index("id"))
    assert html.count("<tr") == 2 and ">id</th>" in html
    crossed = pd.DataFrame({"a": [1]}, pd.Index(["x"], name="family")).rename_axis(columns="difficulty")
    assert all(name in tables.as_html(crossed) for name in ("family", "difficulty"))


def test_long_lines_break_between_words():
    line = "gain " + 12 * "[-0.123, +0.456] "
    first, *rest = tables.wrapped("short", line.strip(), indent=3).splitlines()[1:]
    assert len(first) <= 100 and all(one.startswith(("   [", "   +")) for one in rest)
    assert " ".join([first, *(one.strip() for one in rest)]) == line.strip()
    assert tables.wrapped("a", "b") == "a\nb"


def test_counts_are_read_in_thousands():
    table = tables.side_by_side({"run": {"parameters": 450048, "kept": True, "loss": 0.5}}, 2)
    assert list(table["run"]) == ["450,048", "True", "0.50"]


def test_answers_stand_in_a_column_per_step():
    thought = {"tokens": ["x"], "logprobs": [0.0], "weight": 0.5}
    known = {"question": "q ?", "answer": "4", "position": 0, "tokens": ["q"]}
    made = [
        Episode(problem=0, step=step, answer_with=said, thoughts=[Thought(answer=a, **thought) for a in alone], **known)
        for step, said, alone in ((50, "4", "44"), (0, "3", "34"))
    ]
    table = tables.answers_over_steps(made)
    assert list(table.columns) == ["question", "truth", "step 0", "step 50"]
    assert list(table.loc[1]) == ["q ?", "4", "3 (3 4)", "4 (4 4)"]


def test_the_doctor_speaks_below_live_curves_and_only_where_somebody_watches(monkeypatch):
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what)

    monkeypatch.setattr(figures, "display", lambda first, display_id: Handle())
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    lines = []
    log = figures.live_curves(lambda **m: lines.append(m), every=0)
    log(step=1, reward=0.5)
    assert shown == [] and len(lines) == 1
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    log = figures.live_curves(lambda **m: lines.append(m), every=0)
    for step in range(1, 61):
        log(step=step, reward=0.5, no_thought_weight=1.0)
        if step == 1:
            assert "1 rows say nothing yet" in shown[-1].data
    assert len(lines) == 61 and len(shown) == 120
    assert "gate                SICK: the prediction without thoughts has weight 1.00" in shown[-1].data


@pytest.mark.parametrize(("value", "hidden"), [("1", True), ("", False)])
def test_bars_of_notebooks_can_be_turned_off(value, hidden):
    source = "import qs_lib.workbook; from tqdm.notebook import tqdm; print(tqdm(range(3), display=False).disable)"
    words = [sys.executable, "-c", source]
    told = subprocess.run(words, env=os.environ | {"TQDM_DISABLE": value}, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-1] == str(hidden)
