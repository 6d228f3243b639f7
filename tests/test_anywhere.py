"""Thoughts inside running text: the stories, where a thought pays, and one training for questions and texts."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import problems, tiny_quiet_star

from qs_lib.data import batches, pocket
from qs_lib.data.tokens import encode
from qs_lib.errors import ParameterError, WorkbookError
from qs_lib.evaluation import likelihood, where
from qs_lib.experiments import anywhere
from qs_lib.thoughts.generate import generate_thoughts
from qs_lib.thoughts.rescore import rescore_thoughts
from qs_lib.training import reinforce as r
from qs_lib.training.checkpoint import Checkpoint
from qs_lib.viewing import html
from qs_lib.workbook import anywhere_figures as figures

TOLD = pocket.stories("train", 60)
CHANGES = {**dict.fromkeys(pocket.GAINS, 1), **dict.fromkeys(pocket.LOSSES, -1)}


def totals(text: str) -> list[int]:
    """What a reader of a story counts: every stated result, worked out from its words alone."""
    total, found = None, []
    for sentence in text.split(" . "):
        words = sentence.split()
        if "times" in words:
            total *= int(words[2])
        elif words[1] in CHANGES:
            total += CHANGES[words[1]] * int(words[2])
        elif total is None:
            total = int(words[2])
        else:
            found.append((total, int(words[words.index("has") + 1])))
    return found


def test_a_story_states_what_its_reader_counts():
    for story in TOLD:
        text = f"{story['question']} {story['story']}"
        counted = totals(text)
        assert [a for a, _ in counted] == [b for _, b in counted]
        assert [str(b) for _, b in counted] == [result["answer"] for result in story["results"]]
        assert "?" not in text and pocket.split_of(text) == "train"
        for result in story["results"]:
            assert f"{result['before']} {result['answer']} " in text
            for step in result["steps"]:
                assert eval(step.replace("=", "=="))
    assert {len(result["steps"]) for story in TOLD for result in story["results"]} == {1, 2, 3}


def test_stories_are_new_of_one_split_and_spelt_by_the_tokenizer():
    _, tokenizer = tiny_quiet_star()
    texts = [" ".join(batches.text_of(story)) for story in TOLD]
    assert len(set(texts)) == len(texts) and pocket.stories("train", 60) == TOLD
    assert not {*texts} & {" ".join(batches.text_of(story)) for story in pocket.stories("test", 60)}
    for story in TOLD:
        assert tokenizer.unk_token_id not in encode(tokenizer, *batches.text_of(story)).ids
    with pytest.raises(WorkbookError, match="fewer than"):
        small = pocket.split_of
        try:
            pocket.split_of = lambda text: "never"
            pocket.stories("train", 1)
        finally:
            pocket.split_of = small


def test_every_token_is_measured_and_equals_thinking_there_alone():
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.constant_(model.mixing_head.gate.bias, 0.5)
    texts = [batches.text_of(story) for story in TOLD[:3]]
    given = {"num_thoughts": 2, "thought_length": 5, "temperature": 0.0}  # greedy: the same wherever it is drawn
    found = likelihood.text_log_likelihood(model, tokenizer, texts, positions=0, **given)
    counts = [len(encode(tokenizer, *text).ids) - 2 for text in texts]
    assert [int((~np.isnan(row)).sum()) for row in found["with"]] == counts
    ids = torch.tensor([encode(tokenizer, *texts[1]).ids])
    thoughts = model.think(ids, None, torch.tensor([[7]]), **given)
    scored = rescore_thoughts(model.lm, ids, thoughts, n_true=1, forbid_true=model.config.hidden_ids)
    assert found["with"][1, 6] == pytest.approx(model.mix_truth(scored).item(), abs=1e-4)
    plain = likelihood.plain_log_likelihood(model, tokenizer, texts, positions=0)
    assert np.allclose(plain[likelihood.SHARPENINGS.index(1.0)], found["without"], atol=1e-4, equal_nan=True)


def test_places_are_chosen_by_the_text_alone():
    model, tokenizer = tiny_quiet_star()
    torch.nn.init.normal_(model.gain_head.weight, generator=torch.Generator().manual_seed(0))
    texts = [batches.text_of(story) for story in TOLD[:4]]
    found = where.foreseen(model, tokenizer, texts)
    ids = torch.tensor([encode(tokenizer, *texts[0]).ids])
    places = where.places_to_think(model, ids, count=3)[0].tolist()
    best = np.argsort(-np.r_[[-np.inf], found["expected"][0][: ids.shape[1] - 2]])[:3]
    chosen_first = model.gain_head(model.read(ids))[0, 0].item()
    if chosen_first < found["expected"][0].max():
        assert set(best.tolist()) >= {p for p in places if p} and places == sorted(places)
    later = ids.clone()
    later[0, 10:] = ids[0, 9]
    assert torch.allclose(
        model.gain_head(model.read(later))[0, :10], model.gain_head(model.read(ids))[0, :10], atol=1e-5
    )
    logits = model.lm(input_ids=ids).logits[0, 5].clone()
    logits[model.config.hidden_ids] = -torch.inf
    assert found["entropy"][0, 4] == pytest.approx(
        torch.distributions.Categorical(logits=logits).entropy().item(), 1e-3
    )


def test_shares_and_areas_by_hand():
    nan = np.nan
    gain = np.array([[0.0, 2.0, 0.0, -1.0], [4.0, 0.0, nan, nan]])
    guess = np.array([[0.1, 0.9, 0.2, 0.8], [0.5, 0.4, nan, nan]])
    assert where.chosen(guess, 0.5).tolist() == [[False, True, False, True], [True, False, False, False]]
    half, whole = where.gain_by_share(gain, guess, (0.5, 1.0))
    assert half["value"] == pytest.approx((1 / 4 + 4 / 2) / 2) == whole["value"]
    (one,) = where.gain_by_share(gain, guess, (0.1,))
    assert one["value"] == pytest.approx((2 / 4 + 4 / 2) / 2)
    # places that gain: .9 and .5; others .1 .2 .8 .4: of eight pairs seven are in order
    assert where.area_under_curve(guess, gain)[0] == pytest.approx(7 / 8)
    assert where.ranked(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert np.isnan(where.ranked(np.array([1.0, 2.0]), np.array([True, True])))


def test_a_share_of_a_step_is_whole_texts_and_the_head_learns_where_it_gains(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    drawn = []

    def spy(*given, real=r.draw_rollouts):
        drawn.append(real(*given))
        return drawn[-1]

    monkeypatch.setattr(r, "draw_rollouts", spy)
    settings = {
        "steps": 2,
        "batch_size": 4,
        "num_thoughts": 2,
        "thought_length": 6,
        "num_positions": 5,
        "head_lr": 0.05,
    }
    given = (model, tokenizer, problems(size=12), problems("validation", 4))
    result = r.train_quiet_star(*given, running=r.RunningText(TOLD[:8], share=0.5), **settings)
    asked, told = drawn[0], drawn[1]
    assert asked.thoughts.positions.shape == (8, 1) and told.thoughts.positions.shape == (2, 5)  # 4 x over, 0.5 x 4
    assert all("story" in p for p in told.problems) and not any("story" in p for p in asked.problems)
    assert {"text_nll", "text_gain", "text_no_thought_weight", "gain"} <= result.history[0].keys()
    assert model.gain_head.weight.abs().sum() > 0  # the gate opened, so that there was something to expect


def test_texts_are_scored_in_bfloat16_like_questions(monkeypatch):
    model, tokenizer = tiny_quiet_star()
    halves = []

    def spy(*given, real=r.quiet_star_loss):
        halves.append(torch.is_autocast_enabled("cpu"))
        return real(*given)

    monkeypatch.setattr(r, "quiet_star_loss", spy)
    given = (model, tokenizer, problems(size=8), problems("validation", 4))
    r.train_quiet_star(*given, running=r.RunningText(TOLD[:8]), steps=1, batch_size=2, bf16=True)
    assert halves == [True, True]


def test_without_a_share_nothing_of_it_happens():
    model, tokenizer = tiny_quiet_star()
    result = r.train_quiet_star(model, tokenizer, problems(size=8), problems("validation", 4), steps=1, batch_size=2)
    assert not [name for name in result.history[0] if name.startswith("text_")]


def test_rlp_rewards_the_gain_over_the_slow_average_by_hand():
    """Reward: log-prob of the truth behind a thought minus that of the slow average without one, from plain passes."""
    model, tokenizer = tiny_quiet_star()
    slow, _ = tiny_quiet_star(seed=1)
    ids, mask, positions = batches.answer_batch(tokenizer, problems(size=3))
    generator = torch.Generator().manual_seed(0)
    thoughts = generate_thoughts(model.lm, ids, mask, positions, 3, 8, generator=generator)
    s = r.QuietStarSettings(objective="rlp", kl_coefficient=0.0, base_kl=0.0, n_true=1)
    _, parts, (rewards, advantage) = r.quiet_star_loss(model, slow.lm, tokenizer, ids, mask, thoughts, s)
    assert "kl" not in parts

    def truth(lm, read, token):
        with torch.no_grad():
            logits = lm(torch.tensor([read])).logits[0, -1].clone()
        logits[model.config.hidden_ids] = -torch.inf
        return logits.log_softmax(-1)[token].item()

    for row in range(3):
        at = positions[row, 0].item()
        read, token = ids[row, : at + 1].tolist(), ids[row, at + 1].item()
        said = [t[:n].tolist() for t, n in zip(thoughts.tokens[row, 0], thoughts.lengths[row, 0], strict=True)]
        hand = [truth(model.lm, read + thought, token) - truth(slow.lm, read, token) for thought in said]
        assert rewards[row].tolist() == pytest.approx(hand, abs=1e-4)
        assert advantage[row].tolist() == pytest.approx([1.5 * (x - np.mean(hand)) for x in hand], abs=1e-4)


def test_the_slow_average_follows_and_a_kl_beside_it_is_refused():
    (model, tokenizer), (slow, _) = tiny_quiet_star(), tiny_quiet_star(seed=1)
    before = [p.clone() for p in slow.lm.parameters()]
    r.follow(slow.lm, model.lm)
    for old, new, found in zip(before, model.lm.parameters(), slow.lm.parameters(), strict=True):
        assert torch.allclose(found, 0.999 * old + 0.001 * new)
    given = (model, tokenizer, problems(size=8), problems("validation", 4))
    with pytest.raises(ParameterError, match="set kl_coefficient, base_kl and lora_rank to 0"):
        r.train_quiet_star(*given, objective="rlp", steps=1)
    none = {"kl_coefficient": 0.0, "base_kl": 0.0}
    assert r.train_quiet_star(*given, objective="rlp", steps=1, batch_size=2, thought_length=6, **none).history


def test_lessons_are_stories_thoughts_before_results_and_questions():
    _, tokenizer = tiny_quiet_star()
    lessons = anywhere.story_lessons(tokenizer, TOLD[:5], problems(size=12))
    texts = [(tokenizer.decode(c), tokenizer.decode(w)) for c, w in lessons]
    thoughts = [(c, w) for c, w in texts if w.startswith("<think>") and "<eos>" not in w]
    assert 5 <= len(thoughts) <= 10 and all(c.endswith(" has") for c, _ in thoughts)
    for context, written in thoughts:
        answer = written.split()[-1]
        assert re.search(r"= (\d+) </think>", written)[1] == answer
        assert any(context.endswith(r["before"]) and r["answer"] == answer for s in TOLD[:5] for r in s["results"])
    assert len(texts) - len(thoughts) == 10


def test_a_story_is_kept_token_by_token():
    model, tokenizer = tiny_quiet_star()
    texts = [batches.text_of(story) for story in TOLD[:2]]
    scores = likelihood.text_log_likelihood(model, tokenizer, texts, positions=0, num_thoughts=2, thought_length=5)
    kept = anywhere.example(tokenizer, texts[1], 1, scores, where.foreseen(model, tokenizer, texts))
    words = encode(tokenizer, *texts[1]).ids
    assert kept["words"] == tokenizer.convert_ids_to_tokens(words)[2:]
    assert len(kept["plain"]) == len(kept["gain"]) == len(words) - 2 and sum(kept["thinks"]) == round(len(words) / 10)


def row(arm: str, seed: int, gain: float) -> dict:
    kinds = [
        f"{kind}_over_{control}{part}"
        for kind in anywhere.KINDS
        for control in figures.LABELS
        for part in ("", "_hardest")
    ]
    numbers = dict.fromkeys(kinds, gain) | {f"{guess}_area": 0.9 for guess in figures.GUESSES}
    numbers |= {f"{guess}_shares": [gain * share for share in where.SHARES] for guess in figures.GUESSES}
    about = {"arm": arm, "seed": seed, "settings": {"steps": 50}, "training_seconds": 1800.0, "gain": 0.1}
    return about | numbers | {"checks": 20.0, "checks_reached": 19.0}


def test_tables_say_what_the_rows_say():
    rows = [row("ours", 0, 0.04), row("ours", 1, 0.06), row("rlp", 0, 0.01), row("rlp", 1, 0.01)]
    table = figures.over_controls(rows)
    # mean .05, standard error .01, Student's t of one degree of freedom 12.706
    assert table.loc["stories", "the plain prediction"] == "+0.050 [-0.077, +0.177]" and table.shape == (6, 4)
    beside = figures.objectives(rows)
    assert beside.loc["the same per 1,000 steps", "rlp"].startswith("+0.200")
    assert beside.loc["the same per hour", "rlp"].startswith("+0.020")
    assert beside.loc["theater checks reached", "ours"] == "19/20 19/20"
    assert figures.areas(rows).loc["the gain head", "ours"] == "0.900 [0.900, 0.900]"
    (one,) = [row for row in rows if row["arm"] == "ours"][:1]  # an arm of one seed has no interval yet
    assert figures.areas([one]).loc["the gain head", "ours"] == "0.900"
    assert "[" not in figures.objectives([one]).loc["gain on stories (nats per token)", "ours"]
    lines = figures.where_it_pays(rows).axes[0].lines
    assert lines[0].get_ydata()[-1] == pytest.approx(0.05) and lines[-1].get_ydata()[-1] == pytest.approx(0.05)


def test_gains_in_solutions_are_told_by_kind_of_token_over_seeds():
    rows = [
        {
            f"{part}_over_{control}": n + seed
            for n, part in enumerate(("all", "results", "hardest"))
            for control in likelihood.CONTROLS
        }
        for seed in (0.0, 0.2)
    ]
    table = figures.in_solutions(rows)
    assert list(table.index) == ["all tokens", "results of calculations", "hardest tenth"]
    assert table.loc["results of calculations", "filler of equal length"].startswith("+1.100 [")
    assert figures.in_solutions(rows[:1]).loc["hardest tenth", "the plain prediction"] == "+2.000"


def test_a_story_on_the_screen_is_only_text():
    told = {"words": ["<script>", "20"], "plain": [-9.0, 0.0], "gain": [0.0, 1.26], "thinks": [False, True]}
    shown = html.telling(told)
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert ",1.00)" in shown and "<sub>+1.3</sub>" in shown and shown.count("border:2px") == 1


def test_the_scoreboards_numbers_are_the_worst_of_each_seed(monkeypatch, tmp_path):
    rows = [row("ours", 0, 0.04) | {"solutions_over_without": -0.02}, row("ours", 1, 0.06), row("rlp", 0, -9.0)]
    monkeypatch.setattr(anywhere, "repeat", lambda *_: rows)
    anywhere.anywhere(tmp_path, tmp_path, [0, 1])
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("anywhere_nll", "hard_nll")}
    assert found["anywhere_nll"]["value"] == pytest.approx((-0.02 + 0.06) / 2) and found["anywhere_nll"]["seeds"] == 2
    assert (
        found["hard_nll"]["value"] == pytest.approx(0.05) and found["hard_nll"]["command"] == "make evidence X=anywhere"
    )


def test_rlp_goes_on_from_its_slow_average(tmp_path):
    settings = {"objective": "rlp", "think_at": "random", "num_positions": 2, "n_true": 8, "over": 1, "steps": 5}
    settings |= {"batch_size": 4, "thought_length": 6, "muon_lr": 0.05, "adamw_lr": 0.05, "evaluate_every": 5}
    settings |= {"kl_coefficient": 0.0, "base_kl": 0.0, "grokfast_lambda": 0.0}

    def run(folder, stop=0):
        def log(**metrics):
            if stop and metrics.get("step") == stop:
                raise KeyboardInterrupt

        model, tokenizer = tiny_quiet_star(seed=1)
        given = model, tokenizer, problems(), problems("validation", 3)
        result = r.train_quiet_star(*given, checkpoint=Checkpoint(folder, "x", log, seconds=0), **settings)
        return [row["reward"] for row in result.history], [p.detach().clone() for p in model.parameters()]

    rewards, weights = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop=4)
    again, others = run(tmp_path / "stopped")
    assert again == rewards and all(map(torch.equal, weights, others))


def test_what_disagrees_is_counted_at_one_place():
    tokens = torch.tensor([[[[1, 5, 2]] * 4, [[1, 6, 2]] * 4], [[[1, 5, 2], [1, 6, 2]] * 2, [[1, 5, 2]] * 4]])
    thoughts = SimpleNamespace(tokens=tokens, lengths=torch.full((2, 2, 4), 3))
    assert batches.disagreement(thoughts).tolist() == [1, 2]
