"""Correlation, calibration and preference against cases with a known answer."""

import numpy as np
import pytest

from qs_lib.stats import correlation, reliability, votes


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
