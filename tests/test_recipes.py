"""The settings for real models, at the width of a test."""

import math

import pytest
import torch
from test_baking import plain_trajectories
from tiny import problems, tiny_lm, tiny_quiet_star

import qs_lib as qs
from qs_lib.files import REPOSITORY
from qs_lib.training import baking
from qs_lib.training.settings import BakingSettings, QuietStarSettings
from qs_lib.workbook.params import recipe
from qs_lib.workbook.run import given_parameters, run_options

VARIANTS = ["gsm8k-qwen2.5-0.5b", "gsm8k-qwen2.5-7b"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_real_models_are_trained_with_the_optimizer_settings_meant_for_them(variant):
    bake, learn = recipe("03_baking", variant), recipe("05_rl", variant)
    assert (bake["muon_lr"], bake["adamw_lr"], bake["grokfast_lambda"], bake["qk_clip_threshold"]) == (
        1e-4,
        1e-4,
        0.2,
        30,
    )
    assert (learn["muon_lr"], learn["adamw_lr"], learn["grokfast_lambda"], learn["qk_clip_threshold"]) == (
        5e-4,
        5e-4,
        0.1,
        25,
    )
    assert (
        learn["kl_coefficient"] == 0.1
        and 4 <= learn["num_thoughts"] <= 8
        and learn["thought_length"] == 20
        and learn["adaptive_length"]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainings_run_with_these_settings_at_small_width(variant, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(baking, "sample_trajectories", plain_trajectories)
    chosen = recipe("03_baking", variant)
    small = {"epochs": 1, "trajectories": 8, "batch_size": 4, "max_new_tokens": 4}
    settings = BakingSettings(**{k: chosen[k] for k in BakingSettings.model_fields}).but(**small)
    model, tokenizer = tiny_lm("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = qs.bake(model, tokenizer, [], problems(size=40), problems("validation")[:4], settings)
    assert math.isfinite(result.kl_after) and any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())

    chosen = recipe("05_rl", variant)
    small = {"steps": 2, "batch_size": 2, "evaluate_every": 2}
    settings = QuietStarSettings(**{k: chosen[k] for k in QuietStarSettings.model_fields}).but(**small)
    model, tokenizer = tiny_quiet_star()
    result = qs.train_quiet_star(model, tokenizer, problems(size=24), problems("validation")[:4], settings)
    assert len(result.history) == 2 and all(2 <= row["length"] <= 20 for row in result.history)


def test_another_model_takes_the_place_of_the_variants_one(tmp_path):
    first, last = (REPOSITORY / "notebooks" / f"{name}.ipynb" for name in ("01_token_setup", "05_rl"))
    words = ["--variant", VARIANTS[0]]
    given = [
        given_parameters(first, run_options([*words, *champion]))["champion"]
        for champion in ([], ["--champion", "some/model"], ["--champion", str(tmp_path)])
    ]
    assert given == ["Qwen/Qwen2.5-0.5B", "some/model", str(tmp_path.resolve())]
    assert "champion" not in given_parameters(last, run_options([*words, "--champion", "some/model"]))
