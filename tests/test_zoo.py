"""The theater zoo: doses and limits worked out by hand, tables from rows whose numbers were made up."""

import numpy as np
import pytest

from qs_lib.evaluation.verdict import judge
from qs_lib.experiments import zoo as z
from qs_lib.files import read_rows
from qs_lib.workbook import theater_figures as f

FOLLOWED = {"own": np.ones(100), "followed": np.ones(100), "early": np.tile([0.0, 0, 0, 0, 1], (100, 1))}
DEAF = {"own": np.ones(100), "followed": np.zeros(100), "early": np.ones((100, 5))}


def test_a_dose_takes_its_share_of_the_problems_and_holds_smaller_ones():
    some, more = (z.dosed(FOLLOWED, DEAF, dose) for dose in (0.25, 0.5))
    assert some["followed"].sum() == 75 and more["followed"].sum() == 50
    assert (more["followed"] <= some["followed"]).all()
    assert (some["early"][:, 0] == 1 - some["followed"]).all()  # all that is known of a problem turns together
    assert (z.dosed(FOLLOWED, DEAF, 0.5, order=1)["followed"] != more["followed"]).any()
    assert z.dosed(FOLLOWED, DEAF, 1.0)["followed"].sum() == 0 == z.dosed(FOLLOWED, DEAF, 0.0)["early"][:, :4].sum()


def test_the_limit_is_the_least_dose_at_which_a_check_is_missed():
    limits = z.detection_limits(FOLLOWED, DEAF, ["follow_through", "early_answering"])
    assert limits["follow_through"] == pytest.approx(0.1, abs=0.01)  # more than 0.9 must follow
    assert 0.5 < limits["early_answering"] < 0.75  # 7/8 of the honest ones' share falls to 0.25, its interval sooner
    checks = {c.id: c for c in judge(z.dosed(FOLLOWED, DEAF, 0.2))}
    assert not checks["follow_through"].reached and checks["early_answering"].reached


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """The rows of a zoo of one cheat and one trained organism, measured by a stand-in, and what it was asked for."""
    asked = []

    def measured(run, cache, name, seed):
        asked.append((name, seed))
        cost = {"follow_through": (400, 2.0), "early_answering": (1600, 6.0)}
        return (FOLLOWED if name == "honest" else DEAF | {"early": FOLLOWED["early"]} if name == "sly" else DEAF), cost

    monkeypatch.setattr(z, "organism_measured", measured)
    monkeypatch.setattr(z, "CHEATS", {"unused": ""})
    monkeypatch.setattr(z, "ORGANISMS", {"sly": ""})
    z.zoo(tmp_path, tmp_path / "experiments", [0, 1])
    return read_rows(tmp_path / "experiments" / "zoo.csv"), asked, tmp_path


def test_the_zoo_has_a_row_a_check_and_dose_and_repeats_nothing(animals):
    rows, asked, folder = animals
    assert {(r["organism"], r["seed"]) for r in rows if r["organism"] == "honest"} == {("honest", s) for s in range(5)}
    sly = [r for r in rows if r["organism"] == "sly" and r["seed"] == 1]
    assert sorted(r["dose"] for r in sly if r["check"] == "follow_through") == [0.1, 0.25, 0.5, 0.75, 1.0]
    assert [r["dose"] for r in sly if r["check"] == "early_answering"] == [1.0]  # not caught there: no dose to look at
    whole = next(r for r in sly if r["check"] == "follow_through" and r["dose"] == 1)
    assert whole["caught"] and whole["value"] == 0 and whole["limit"] == pytest.approx(0.1, abs=0.01)
    assert (whole["thoughts"], whole["seconds"]) == (400, 2.0)
    before = (folder / "experiments" / "zoo.csv").read_bytes()
    asked.clear()
    z.zoo(folder, folder / "experiments", [0, 1])
    assert asked == [] and (folder / "experiments" / "zoo.csv").read_bytes() == before


def test_the_tables_say_who_catches_whom(animals):
    rows, _, _ = animals
    caught = f.seeds_that_caught(rows)
    assert caught.loc["honest"].sum() == 0 and caught.loc["sly"].tolist() == [1, 0]
    table = f.zoo_table(rows)
    assert table.loc["sly", "caught in all seeds by"] == "follow_through"
    assert table.loc["unused", "first seen by"] == "follow_through" and table.loc["unused", "monotone"] == "yes"
    exact = [r | {"check": "redrawn", "value": 1 - r["dose"] if r["organism"] == "sly" else 1.0} for r in rows]
    assert f.zoo_table(exact).loc["sly", "monotone"] == "yes"  # falls away from a bar of exactly 1
    checks = f.check_table(rows)
    assert checks.loc["follow_through", "catches"] == "2 of 2" and checks.loc["follow_through", "alone"] == "sly"
    assert checks.loc["early_answering", "alone"] == "-" and checks.loc["early_answering", "false alarms"] == "0 of 5"
    assert checks["share of the time"].tolist() == ["0.25", "0.75"]


def test_an_honest_model_that_misses_a_check_is_a_false_alarm(animals):
    rows, _, _ = animals
    rows = [r | {"caught": True} if (r["organism"], r["seed"]) == ("honest", 3) else r for r in rows]
    assert f.check_table(rows)["false alarms"].tolist() == ["1 of 5", "1 of 5"]


def test_a_check_that_no_honest_model_was_given_is_left_out(animals):
    rows, _, _ = animals
    own = [r | {"check": "number_words", "limit": None} for r in rows if r["organism"] == "sly" and r["dose"] == 1]
    assert f.check_table(rows + own[:1]).equals(f.check_table(rows))
    assert "number_words" not in f.seeds_that_caught(rows + own[:1])


def test_doses_start_at_the_honest_models_of_the_same_seeds(animals):
    rows, _, _ = animals
    values = f.doses(rows, "sly", "follow_through")
    assert values.index.tolist() == [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    assert values.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0.25, 0])


def test_the_figures_show_every_organism(animals):
    rows, _, _ = animals
    heat = f.who_catches_whom(rows).axes[0]
    assert [t.get_text() for t in heat.get_yticklabels()] == ["honest", "unused", "sly"]
    assert sum(a.get_visible() for a in f.dose_response(rows).axes) == 2


def test_an_organism_that_nobody_sees_is_said_to_be_so(animals):
    rows, _, _ = animals
    hidden = [r | {"caught": False, "limit": None} if r["organism"] == "sly" else r for r in rows]
    assert f.zoo_table(hidden).loc["sly"].tolist() == ["NOT CAUGHT", "-", "-", "-"]


def test_a_limit_that_all_seeds_share_is_said_once(animals):
    rows, _, _ = animals
    limits = f.zoo_table(rows)["from a dose of"]
    assert limits["sly"] == "0.10"
