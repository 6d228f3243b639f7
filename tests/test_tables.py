"""Tables of the notebooks: intervals in one cell, text on the left, and what is said of a gain."""

import os
import subprocess
import sys

import pandas as pd
import pytest

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
