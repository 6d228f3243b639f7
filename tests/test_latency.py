"""What is measured is what is said; how long it took is nobody's test."""

import json

import pytest
import tiny
import torch

from qs_lib.evaluation import latency
from qs_lib.experiments import model_sizes
from qs_lib.workbook import figures, scoreboard, tables


@pytest.fixture(scope="module")
def report():
    model, _ = tiny.tiny_quiet_star()
    ids = torch.randint(20, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    return latency.measure_latency(model, ids, positions=(1, 2), num_thoughts=(1,), thought_lengths=(5,), repeats=2)


def test_every_setting_and_the_default_are_timed(report):
    settings = [(r["positions"], r["num_thoughts"], r["thought_length"]) for r in report.rows]
    assert settings == [(1, 1, 5), (2, 1, 5), (1, 3, 8)]
    assert report.median_ms == report.rows[-1]["median_ms"] <= report.p95_ms
    assert all(0 < r["median_ms"] <= r["p95_ms"] and r["meets"] == (r["p95_ms"] < 200) for r in report.rows)
    assert report.parallel_speedup > 0 and report.parallel_speedup_all > 0 and report.plain_ms > 0
    summary = scoreboard.latency_summary(report)
    assert summary["parallel_speedup_all"] == report.parallel_speedup_all and summary["settings"] == 3
    json.dumps(report.to_dict(), allow_nan=False)


def test_one_by_one_samples_as_many_tokens_as_a_thought_has():
    model, _ = tiny.tiny_quiet_star()
    ids = torch.randint(20, 60, (1, 9))
    written = latency.generate_alone(model, ids)[0]
    assert torch.equal(written[:9], ids[0]) and written[9] == model.config.think_token_id
    assert len(written) <= 9 + model.config.thought_length - 1  # the forced </think> is not written


def test_random_models(monkeypatch):
    monkeypatch.setitem(model_sizes.RANDOM_MODELS, "small", (32, 48, 2, 4, 2, 64))
    settings = ((1, 1, 4), (2, 3, 5), (8, 1, 4))
    rows = model_sizes.measure_models(["small"], (4, 6), settings, repeats=2, seconds=0, target_ms=1e9)
    # eight positions do not fit in texts of four and six tokens
    assert [(r["text_length"], r["positions"]) for r in rows] == [(4, 1), (4, 2), (6, 1), (6, 2)]
    for row in rows:
        assert row["repeats"] == 2 and row["meets"] and 0 < row["median_ms"] <= row["p95_ms"]
        assert list(row["shares"]) == ["reading", "sampling", "mixing", "steps"]
        assert sum(row["shares"].values()) == pytest.approx(1) and min(row["shares"].values()) >= 0
    table = tables.model_latency_table(rows)
    assert len(table) == 4 and set(table["outcome"]) == {"meets the target"}
    figure = figures.model_latency(rows, 200.0)
    assert len(figure.axes) == 2


@pytest.mark.parametrize("name", model_sizes.RANDOM_MODELS)
def test_sizes_are_what_they_are_called(name):
    with torch.device("meta"):
        size = sum(p.numel() for p in model_sizes.random_model(name).lm.parameters())
    assert abs(size / 1e6 / float(name[:-1]) - 1) < 0.2


def test_bench_lines_name_what_was_missed():
    line = {"kind": "bar", "claim": "generate / ours", "shape": "10M_L64", "direction": ">=", "bound": 4}
    lines = [
        line | {"value": 5.0, "reached": True},
        line | {"value": 3.0, "reached": False},
        line | {"value": None, "reached": None},
        line | {"kind": "seen", "bound": None, "value": 2.0, "reached": None},
    ]
    table = tables.bench_lines({"lines": lines})
    assert table["outcome"].tolist() == ["reached", "NOT reached", "-", "-"]
    assert table["measured"].tolist() == ["5", "3", "not measured", "2"]
    assert table["bound"].tolist() == [">= 4"] * 3 + ["-"]
    assert len(figures.bench_ratios(lines).axes[0].get_yticklabels()) == 3


def test_committed_bench_file_says_what_its_numbers_say():
    result = tables.read_bench()
    if not result:
        pytest.skip("no bench file is committed")
    assert result["repeats"] >= 3 and result["command"] == "make bench"
    for line in result["lines"]:
        found = [
            value
            for section in ("generation", "rescoring", "latency", "masks", "memory")
            for value in result.get(section, {}).get(line["shape"], {}).values()
            if value == line["value"]
        ]
        assert found or line["value"] is None, line
        if None not in (line["value"], line["bound"]):
            over = line["value"] >= line["bound"]
            assert line["reached"] == (
                over if line["direction"] == ">=" else not over or line["value"] == line["bound"]
            )
