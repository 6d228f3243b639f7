"""The scoreboard: every criterion of the workbook in one list, each with its value, its interval and where it is from.

What a run did not measure is listed with value None and not reached. It is never left out.
"""

import json
import operator
import shutil
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation.accuracy import read_problems
from ..evaluation.coherence import WEIGHTS, Scale
from ..evaluation.latency import LatencyReport
from ..evaluation.theater import TheaterReport
from ..files import find_run
from ..stats import as_text, named
from .stage import Stage, read_stage

TOKENS, DATASET, BAKING, RL = "01_token_setup", "02_dataset_generation", "03_baking", "05_rl"
THEATER, LATENCY = "06_anti_theater", "07_latency"
CHAIN_STAGES = (TOKENS, DATASET, BAKING, "04_parallel_thoughts", RL, THEATER, LATENCY)
GAIN, LARGE_GAIN, HARD_GAIN = "> 0, interval above 0", ">= 0.05, interval above 0", ">= 0.2, interval above 0"
AT_ONE = "claim: 0.42 at scale 1"
OVER_ALONE = ">= 0.3, interval above 0.2"
REPORTED = "reported"  # the target of a criterion that is shown and not judged
COMPARISONS = {"": operator.eq, ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


class Criterion(NamedTuple):
    """One line of the scoreboard. ``target`` is the text that is shown and the rule that :func:`meets` applies."""

    id: str
    text: str
    target: str
    unit: str
    stage: str = ""  # the stage that measures it; "" where a file of its own holds it
    key: str = ""  # its name in the stage's summary, where that is not the id


CRITERIA = (
    Criterion("tokens_added", "thinking tokens added", "8", "tokens", TOKENS),
    Criterion("examples", "worked examples that passed their check", ">= 1800", "examples", DATASET, "verified"),
    Criterion("strategies", "strategies beside chain of thought", "7", "strategies", DATASET),
    Criterion("baking_accuracy", "unprompted accuracy of the baked model", ">= 0.85", "share", BAKING),
    Criterion("gap_closed", "share of the prompted-unprompted KL gap closed", ">= 0.9", "share", BAKING),
    Criterion("thinking_use", "replies that think, baked model", "> 0.8", "share", BAKING),
    Criterion("strategy_fit", "replies with a fitting strategy, baked model", "> 0.6", "share", BAKING),
    Criterion("accuracy_gain", "accuracy after RL minus baked, same thought budget", LARGE_GAIN, "share", RL),
    Criterion("accuracy_with", "accuracy after RL, with thoughts", REPORTED, "share", RL),
    Criterion("accuracy_without", "accuracy after RL, thoughts removed", REPORTED, "share", RL),
    Criterion("divergence", "edit distance from the direct continuation", "> 0.3", "", THEATER),
    Criterion("ablation_gain", "accuracy with own thoughts minus none", GAIN, "share", THEATER),
    Criterion("foreign_gain", "accuracy with own thoughts minus foreign ones", GAIN, "share", THEATER),
    Criterion("filler_gain", "accuracy with own thoughts minus filler", GAIN, "share", THEATER),
    Criterion("coherence_utility_r", "label-free coherence against utility, r over thoughts", "> 0.5", "", THEATER),
    Criterion("follow_through", "answers that go where an altered thought leads", ">= 0.9", "share", THEATER),
    Criterion("latency_ms", "forward pass with thoughts, default setting, median", "< 200", "ms", LATENCY),
    Criterion("latency_p95_ms", "the same, 95th percentile", "< 200", "ms", LATENCY),
    Criterion("parallel_speedup", "thoughts one by one / all at once, time", ">= 3.7", "times", LATENCY),
    Criterion("memory_overhead", "peak memory over the plain forward's", "<= 0.33", "share", LATENCY),
    Criterion("jumpstart", "1 - RL steps from baked / from un-baked, to the same accuracy", ">= 0.3", "share"),
    Criterion("nonmyopic_steps", "RL steps with n_true 4 over n_true 1, minus 1", "<= -0.25", "share"),
    Criterion("nonmyopic_accuracy", "accuracy with n_true 4 minus n_true 1", ">= 0.044", "share"),
    Criterion("token_scale_use", f"thinking-token use at gradient scale 100 ({AT_ONE})", ">= 0.89", "share"),
    Criterion("over_answers_alone", "accuracy minus that of equal training without thoughts", OVER_ALONE, "share"),
    Criterion("anywhere_nll", "gain on held-out text, thoughts at every position", ">= -0.01", "nats per token"),
    Criterion("hard_nll", "gain on stories' hardest tenth over each control", HARD_GAIN, "nats per token"),
    Criterion("coverage", "test coverage of qs_lib", ">= 0.90", "share"),
)


def meets(target: str, value: float | None, low: float | None) -> bool | None:
    """Say whether a value with the lower end ``low`` of its interval reaches a target, None where it is only reported.

    A target is a number, or a comparison with one such as ``">= 0.85"``, and may go on with ``", interval above 0"``.
    The value itself then stands for an interval that was not measured.
    """
    if value is None:
        return False
    if target == REPORTED:
        return None
    comparison, *interval = target.split(", ")
    *sign, bound = comparison.split()
    sure = all((value if low is None else low) > float(words.split()[-1]) for words in interval)
    return COMPARISONS["".join(sign)](value, float(bound)) and sure


def build_scoreboard(run: str | Path) -> list[dict]:
    """Return all criteria, in order, as ``{id, criterion, target, value, low, high, unit, reached, source}``.

    Values come from the summaries in the ``run.json`` of the run folder's stages, and only of stages whose files still
    hold. Those of experiments outside the chain come from ``experiments/<id>.json`` (value, low, high, command),
    coverage from ``coverage.json`` (``make coverage``). ``reached`` is None where a criterion is only reported.
    """
    board, run = [], Path(run)
    for id, text, target, unit, stage, key in CRITERIA:
        outside = _coverage(run) if id == "coverage" else _experiment(run, id)
        value, low, high, source = _from_stage(run, stage, key or id) if stage else outside
        row = {"id": id, "criterion": text, "target": target, "value": value, "low": low, "high": high, "unit": unit}
        board.append(row | {"reached": meets(target, value, low), "source": source})
    return board


def _from_stage(run: Path, stage: str, key: str) -> tuple:
    record, reason = read_stage(run / stage)
    if record is None:
        return None, None, None, f"{stage}: {reason}; make it with `make run RUN={run.name} NB={stage}`"
    summary, where = record["summary"], f"{stage}/run.json, {record['command']}"
    return summary.get(key), summary.get(f"{key}_low"), summary.get(f"{key}_high"), where


def _experiment(run: Path, name: str) -> tuple:
    if not (path := run / "experiments" / f"{name}.json").is_file():
        return None, None, None, f"not measured by this run: no experiments/{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["value"], found.get("low"), found.get("high"), f"experiments/{name}.json, {found['command']}"


def _coverage(run: Path) -> tuple:
    path, command = run / "coverage.json", f"make coverage RUN={run.name}"
    if not path.is_file():
        return None, None, None, f"not measured by this run: make it with `{command}`"
    percent = json.loads(path.read_text(encoding="utf-8"))["totals"]["percent_covered"]
    return percent / 100, None, None, f"coverage.json, {command}"


def missing_stages(run: str | Path) -> dict[str, str]:
    """Return the stages of the chain that the run has not finished, each with the reason."""
    found = {stage: read_stage(Path(run) / stage) for stage in CHAIN_STAGES}
    return {stage: reason for stage, (record, reason) in found.items() if record is None}


def provenance(folder: str | Path) -> str:
    """Say in one line who made a finished stage: command, commit, seed, kind of machine, time. No machine is named."""
    record, reason = read_stage(Path(folder))
    if record is None:
        return reason
    commit = (record["git_commit"] or "no commit")[:12]
    machine = f"{record['device']} ({record['device_name']}, {record['threads']} threads)"
    return f"`{record['command']}`, {commit}, seed {record['seed']}, {machine}, {record['wall_s']:.0f} s"


def outcome(row: dict) -> str:
    """Return one row's outcome in words."""
    if row["value"] is None:
        return "not reached (not measured)"
    return {True: "reached", False: "not reached", None: REPORTED}[row["reached"]]


def value_text(row: dict) -> str:
    """Return a row's value, interval and unit for reading, to three significant digits."""
    if row["value"] is None:
        return "-"
    interval = "" if row["low"] is None else f" [{as_text(row['low'])}, {as_text(row['high'])}]"
    return f"{as_text(row['value'])}{interval} {row['unit']}".strip()


def coherence_summary(scale: Scale, report: TheaterReport) -> dict:
    """Return what ``coherence.json`` holds: the score's scale, weights and r with utility on test problems."""
    check = report.check("coherence_utility_r")
    scores = {name: [row["coherence"][name] for row in report.table] for name in ("composite", *WEIGHTS)}
    summary = {"scale": vars(scale), "weights": WEIGHTS, "thoughts": len(report.table)}
    summary |= {"mean": {name: sum(values) / len(values) for name, values in scores.items()}}
    summary |= named("utility_r", (check.value, check.low, check.high))
    return summary | named("utility_r_within", report.within_r)


def latency_summary(report: LatencyReport) -> dict:
    """Return the default setting's times (ms) for notebook 07, and how many of the ``settings`` meet the target."""
    alike = ("plain_ms", "parallel_speedup", "parallel_speedup_all", "memory_overhead", "target_ms")
    summary = {"latency_ms": report.median_ms, "latency_p95_ms": report.p95_ms}
    summary |= {name: getattr(report, name) for name in alike}
    return summary | {"settings_meeting": sum(row["meets"] for row in report.rows), "settings": len(report.rows)}


def ladder_steps(run: str | Path) -> dict[str, tuple]:
    """Return test accuracy (value, low, high) stage by stage, for ``figures.ladder``, and None where not measured."""
    steps = {
        "champion, direct": (THEATER, "champion_direct"),
        "baked, with thoughts": (RL, "accuracy_baseline"),
        "after RL, with thoughts": (RL, "accuracy_with"),
        "after RL, thoughts removed": (RL, "accuracy_without"),
    }
    return {label: _from_stage(Path(run), stage, key)[:3] for label, (stage, key) in steps.items()}


def hand_over(stage: Stage, name: str) -> bool:
    """Copy a file of the stage to the model in ``<run>/quietstar/``, if that is the run whose model was measured."""
    model = stage.run / "quietstar"
    if find_run(stage.params.upstream) != stage.run or not model.is_dir():
        return False
    shutil.copyfile(stage.path(name), model / name)
    return True


def model_card(board: list[dict], run: str | Path) -> ModelCard:
    """Return the card of a run's ``quietstar/``: what the model is, its scores as they are, how to load and ask it."""
    run = Path(run)
    record, _ = read_stage(run / RL)
    problems = run / DATASET / "test.parquet"
    question = read_problems(problems)[0]["question"] if problems.is_file() else "how many ?"
    lines = ["| id | criterion | target | value [95 % interval] | outcome |", "|---|---|---|---|---|"]
    lines += [f"| {r['id']} | {r['criterion']} | {r['target']} | {value_text(r)} | {outcome(r)} |" for r in board]
    kind = {"language": "en", "license": "apache-2.0", "tags": ["quiet-star", "reasoning", "reinforce"]}
    data = ModelCardData(**kind, library_name="transformers", pipeline_tag="text-generation")
    seed, quoted = record["seed"] if record else "unknown", json.dumps(question).replace("`", r"\u0060")
    text = CARD.format(run=run.name, seed=seed, scores="\n".join(lines), question=quoted)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


CARD = """\
# Quiet-STaR model of the run {run}

A causal language model that samples short thoughts in parallel before it predicts, and mixes what they predict with
what it would have said without them. Made by notebooks 01 to 05 of the Quiet-STaR workbook (seed {seed}): reasoning
habits baked into a champion, then REINFORCE on thoughts that help to predict what truly follows.

```python
import qs_lib  # registers the architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("outputs/{run}/quietstar")
tokenizer = AutoTokenizer.from_pretrained("outputs/{run}/quietstar")
question = {question}
ids = tokenizer((tokenizer.bos_token or "") + question, add_special_tokens=False, return_tensors="pt")
reply = model.generate(**ids, max_new_tokens=8, do_sample=False)      # thinks before it answers
plain = model.lm.generate(**ids, max_new_tokens=8, do_sample=False)   # the language model inside, by itself
print(tokenizer.decode(reply[0, ids.input_ids.shape[1] :]))
```

`coherence.json` holds the scale of the coherence score and its relation to utility, `latency.json` what thinking costs.

## Scores

{scores}

"not reached" means that the target was tested and missed, or that this run did not measure it. The sources of all
values are in `scoreboard.json` of the run.

## Limits

A small model of one task: it shows a method and its checks, not general ability. Thoughts are text that the model was
trained to find useful; they are no proof of how it came to its answer.
"""
