"""Correlation, calibration and preference against cases with a known answer, and numbers as text."""

import numpy as np
import pytest

from qs_lib.stats import as_text, correlation, fixed, pearson, reliability, shown, votes


def test_correlation_recovers_a_known_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    r, low, high = correlation(x, 0.8 * x + 0.6 * rng.normal(size=x.shape))
    assert low < 0.8 < high and r == pytest.approx(0.8, abs=0.05)
    assert correlation(np.ones((5, 2)), rng.normal(size=(5, 2)))[0] == 0.0


def test_correlation_within_problems_ignores_which_problems_are_easy():
    rng = np.random.default_rng(0)
    easy = 5 * rng.normal(size=(200, 1))
    x, y = easy + rng.normal(size=(200, 4)), easy + rng.normal(size=(200, 4))
    assert correlation(x, y)[0] > 0.9
    r, low, high = correlation(x, y, within=True)
    assert low < 0 < high and abs(r) < 0.1
    assert correlation(easy + x, easy + x, within=True)[0] == pytest.approx(1)


def test_a_probability_is_calibrated_and_its_square_is_not():
    rng = np.random.default_rng(0)
    p = rng.random((2000, 4))
    right = rng.random(p.shape) < p
    good, bad = reliability(p, right), reliability(p**2, right)
    assert good.error[0] < 0.02 and good.error[1] <= good.error[0] <= good.error[2]
    assert bad.error[0] == pytest.approx(1 / 2 - 1 / 3, abs=0.02)  # E[p - p^2]
    assert good.preference == bad.preference and good.preference[1] > 0.5  # squaring keeps the order
    for row in good.bins:
        assert row["low"] <= row["right"] <= row["high"]
    assert sum(row["count"] for row in good.bins) == p.size


def test_calibration_and_preference_by_hand():
    score = np.array([[0.9, 0.1], [0.9, 0.9], [0.2, 0.3]])
    right = np.array([[1, 0], [1, 0], [1, 0]])
    got = reliability(score, right)
    assert [(round(b["score"], 3), b["right"], b["count"]) for b in got.bins] == [
        (0.1, 0, 1),
        (0.2, 1, 1),
        (0.3, 0, 1),
        (0.9, 2 / 3, 3),
    ]
    assert got.error[0] == pytest.approx((0.1 + 0.8 + 0.3 + 3 * (0.9 - 2 / 3)) / 6)
    assert got.preference[0] == 0.5 and got.disputed == 3  # one won, one tied, one lost


def test_without_right_and_wrong_thoughts_of_one_problem_nothing_is_known():
    got = reliability(np.full((4, 3), 1.0), np.ones((4, 3)))
    assert got.preference == (0.5, 0.0, 1.0) and got.disputed == 0 and got.error[0] == 0.0


def test_votes_are_those_of_all_branches_that_agree():
    got = votes([[0.4, 0.3, 0.2, 0.1]], [["7", "8", "7", "8"]])
    assert got.tolist() == [pytest.approx([0.4, 0.6, 0.4])]


def test_pearson_of_a_constant_is_zero():
    assert pearson([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx(1) and pearson([1.0, 1.0], [0.0, 5.0]) == 0.0
    assert pearson(np.full(3, 0.1) - np.array([0.0, 1e-17, 0.0]), [1.0, 2.0, 3.0]) == 0.0, "rounding noise is constant"


def test_numbers_as_text():
    assert (fixed(-0.0004), fixed(0.5, 2, True), fixed(1234.5, 0)) == ("0.000", "+0.50", "1234")
    assert shown((0.8125, 0.75, 0.875)) == "0.812 [0.750, 0.875]" and shown((0.1, -0.0001, 0.2), True, 1) == (
        "+0.1 [+0.0, +0.2]"
    )
    assert [as_text(x) for x in (0.12345, 1234, "word", True, np.float64(1e-9))] == [
        "0.123",
        "1234",
        "word",
        "True",
        "1e-09",
    ]
    assert [as_text(x, 2) for x in (0.12345, 1234, -0.001)] == ["0.12", "1234", "0.00"]
