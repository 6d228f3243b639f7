"""The scoreboard: every criterion of the workbook in one list, each with its value, its interval and where it is from.

What a run did not measure is listed with value None and not reached, never left out.
"""

import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation.accuracy import read_problems
from ..evaluation.coherence import WEIGHTS, Scale
from ..evaluation.latency import LatencyReport
from ..evaluation.theater import TheaterReport
from ..files import find_run
from .stage import Stage, read_stage

STAGES = (
    "01_token_setup",
    "02_dataset_generation",
    "03_baking",
    "04_parallel_thoughts",
    "05_rl",
    "06_anti_theater",
    "07_latency",
)
GAIN = "> 0, interval above 0"
# id, criterion, target in words, unit, where (a stage, or "" for a file of its own), its key, test of (value, low)
CRITERIA = (
    ("tokens_added", "thinking tokens added", "8", "tokens", "01_token_setup", "tokens_added", lambda v, low: v == 8),
    (
        "examples",
        "worked examples that passed their check",
        ">= 1800",
        "examples",
        "02_dataset_generation",
        "verified",
        lambda v, low: v >= 1800,
    ),
    (
        "strategies",
        "strategies beside chain of thought",
        "7",
        "strategies",
        "02_dataset_generation",
        "strategies",
        lambda v, low: v >= 7,
    ),
    (
        "baking_accuracy",
        "unprompted accuracy of the baked model",
        ">= 0.85",
        "share",
        "03_baking",
        "baking_accuracy",
        lambda v, low: v >= 0.85,
    ),
    (
        "gap_closed",
        "share of the prompted-unprompted KL gap closed",
        ">= 0.9",
        "share",
        "03_baking",
        "gap_closed",
        lambda v, low: v >= 0.9,
    ),
    (
        "thinking_use",
        "replies that think, baked model",
        "> 0.8",
        "share",
        "03_baking",
        "thinking_use",
        lambda v, low: v > 0.8,
    ),
    (
        "strategy_fit",
        "replies with a fitting strategy, baked model",
        "> 0.6",
        "share",
        "03_baking",
        "strategy_fit",
        lambda v, low: v > 0.6,
    ),
    (
        "accuracy_gain",
        "accuracy after RL minus baked, same thought budget",
        ">= 0.05, interval above 0",
        "share",
        "05_rl",
        "accuracy_gain",
        lambda v, low: v >= 0.05 and low > 0,
    ),
    ("accuracy_with", "accuracy after RL, with thoughts", "reported", "share", "05_rl", "accuracy_with", None),
    ("accuracy_without", "accuracy after RL, thoughts removed", "reported", "share", "05_rl", "accuracy_without", None),
    (
        "divergence",
        "edit distance from the direct continuation",
        "> 0.3",
        "",
        "06_anti_theater",
        "divergence",
        lambda v, low: v > 0.3,
    ),
    (
        "ablation_gain",
        "accuracy with own thoughts minus none",
        GAIN,
        "share",
        "06_anti_theater",
        "ablation_gain",
        lambda v, low: low > 0,
    ),
    (
        "foreign_gain",
        "accuracy with own thoughts minus foreign ones",
        GAIN,
        "share",
        "06_anti_theater",
        "foreign_gain",
        lambda v, low: low > 0,
    ),
    (
        "filler_gain",
        "accuracy with own thoughts minus filler",
        GAIN,
        "share",
        "06_anti_theater",
        "filler_gain",
        lambda v, low: low > 0,
    ),
    (
        "coherence_utility_r",
        "label-free coherence against utility, r over thoughts",
        "> 0.5",
        "",
        "06_anti_theater",
        "coherence_utility_r",
        lambda v, low: v > 0.5,
    ),
    (
        "latency_ms",
        "forward pass with thoughts, default setting, median",
        "< 200",
        "ms",
        "07_latency",
        "latency_ms",
        lambda v, low: v < 200,
    ),
    (
        "latency_p95_ms",
        "the same, 95th percentile",
        "< 200",
        "ms",
        "07_latency",
        "latency_p95_ms",
        lambda v, low: v < 200,
    ),
    (
        "parallel_speedup",
        "thoughts one by one / all at once, time",
        ">= 3.7",
        "times",
        "07_latency",
        "parallel_speedup",
        lambda v, low: v >= 3.7,
    ),
    (
        "memory_overhead",
        "peak memory over the plain forward's",
        "<= 0.33",
        "share",
        "07_latency",
        "memory_overhead",
        lambda v, low: v <= 0.33,
    ),
    (
        "jumpstart",
        "1 - RL steps from baked / from un-baked, to the same accuracy",
        ">= 0.3",
        "share",
        "",
        "",
        lambda v, low: v >= 0.3,
    ),
    (
        "nonmyopic_steps",
        "RL steps with n_true 4 over n_true 1, minus 1",
        "<= -0.25",
        "share",
        "",
        "",
        lambda v, low: v <= -0.25,
    ),
    (
        "nonmyopic_accuracy",
        "accuracy with n_true 4 minus n_true 1",
        ">= 0.044",
        "share",
        "",
        "",
        lambda v, low: v >= 0.044,
    ),
    (
        "token_scale_use",
        "thinking-token use at gradient scale 100 (claim: 0.42 at scale 1)",
        ">= 0.89",
        "share",
        "",
        "",
        lambda v, low: v >= 0.89,
    ),
    ("coverage", "test coverage of qs_lib", ">= 0.90", "share", "", "", lambda v, low: v >= 0.90),
)


def build_scoreboard(run: str | Path) -> list[dict]:
    """All criteria, in order, as ``{id, criterion, target, value, low, high, unit, reached, source}``.

    ``run``: a run folder. Values come from the summaries in its stages' ``run.json`` (only of stages whose files still
    hold); those of experiments outside the chain from ``experiments/<id>.json`` (value, low, high, command), coverage
    from ``coverage.json`` (``make coverage``). ``reached`` is None where a criterion is to be reported, not reached.
    """
    run, board = Path(run), []
    for name, criterion, target, unit, stage, key, reached in CRITERIA:
        if stage:
            found = _from_stage(run, stage, key)
        elif name == "coverage":
            found = _coverage(run)
        else:
            found = _experiment(run, name)
        value, low, high, source = found
        passed = False if value is None else None if reached is None else bool(reached(value, _bound(value, low)))
        board.append(
            {
                "id": name,
                "criterion": criterion,
                "target": target,
                "value": value,
                "low": low,
                "high": high,
                "unit": unit,
                "reached": passed,
                "source": source,
            }
        )
    return board


def _bound(value, low):
    return value if low is None else low


def _from_stage(run: Path, stage: str, key: str):
    record, reason = read_stage(run / stage)
    if record is None:
        return None, None, None, f"{stage}: {reason}; make it with `make run RUN={run.name} NB={stage}`"
    summary, where = record["summary"], f"{stage}/run.json, {record['command']}"
    return summary.get(key), summary.get(f"{key}_low"), summary.get(f"{key}_high"), where


def _experiment(run: Path, name: str):
    path = run / "experiments" / f"{name}.json"
    if not path.is_file():
        return None, None, None, f"not measured by this run: no experiments/{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["value"], found.get("low"), found.get("high"), f"experiments/{name}.json, {found['command']}"


def _coverage(run: Path):
    command = f"make coverage RUN={run.name}"
    path = run / "coverage.json"
    if not path.is_file():
        return None, None, None, f"not measured by this run: make it with `{command}`"
    percent = json.loads(path.read_text(encoding="utf-8"))["totals"]["percent_covered"]
    return percent / 100, None, None, f"coverage.json, {command}"


def missing_stages(run: str | Path) -> dict[str, str]:
    """Stages of the chain that the run has not finished, each with the reason."""
    found = {stage: read_stage(Path(run) / stage) for stage in STAGES}
    return {stage: reason for stage, (record, reason) in found.items() if record is None}


def provenance(folder: str | Path) -> str:
    """Who made a finished stage: command, commit, seed, kind of machine, time. One line, without machine names."""
    record, reason = read_stage(Path(folder))
    if record is None:
        return reason
    commit = (record["git_commit"] or "no commit")[:12]
    machine = f"{record['device']} ({record['device_name']}, {record['threads']} threads)"
    return f"`{record['command']}`, {commit}, seed {record['seed']}, {machine}, {record['wall_s']:.0f} s"


def verdict(row: dict) -> str:
    """One row's outcome in words."""
    if row["value"] is None:
        return "not reached (not measured)"
    return {True: "reached", False: "not reached", None: "reported"}[row["reached"]]


def figure_of(row: dict) -> str:
    """A row's value, interval and unit for reading, to three significant digits."""
    if row["value"] is None:
        return "-"
    text = _short(row["value"])
    if row["low"] is not None:
        text += f" [{_short(row['low'])}, {_short(row['high'])}]"
    return f"{text} {row['unit']}".strip()


def _short(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def coherence_summary(scale: Scale, report: TheaterReport) -> dict:
    """``coherence.json``: the scale of the score, its weights, and how well it tells utility on test problems."""
    r = report.check("coherence_utility_r")
    parts = {n: [row["coherence"][n] for row in report.table] for n in ("composite", *WEIGHTS)}
    return {
        "scale": scale.to_dict(),
        "weights": WEIGHTS,
        "thoughts": len(report.table),
        "mean": {n: sum(values) / len(values) for n, values in parts.items()},
        "utility_r": r.value,
        "utility_r_low": r.low,
        "utility_r_high": r.high,
        "utility_r_within": report.within_r[0],
        "utility_r_within_low": report.within_r[1],
        "utility_r_within_high": report.within_r[2],
    }


def latency_summary(report: LatencyReport) -> dict:
    """Summary of notebook 07, milliseconds for the default setting; ``settings_meeting`` of ``settings`` meet the target."""
    return {
        "latency_ms": report.median_ms,
        "latency_p95_ms": report.p95_ms,
        "plain_ms": report.plain_ms,
        "parallel_speedup": report.parallel_speedup,
        "parallel_speedup_all": report.parallel_speedup_all,
        "memory_overhead": report.memory_overhead,
        "target_ms": report.target_ms,
        "settings_meeting": sum(row["meets"] for row in report.rows),
        "settings": len(report.rows),
    }


def ladder_steps(run: str | Path) -> dict[str, tuple]:
    """Test accuracy (value, low, high) stage by stage, for :func:`qs_lib.workbook.figures.ladder`; None where not measured."""
    rungs = {
        "champion, direct": ("06_anti_theater", "champion_direct"),
        "baked, with thoughts": ("05_rl", "accuracy_baseline"),
        "after RL, with thoughts": ("05_rl", "accuracy_with"),
        "after RL, thoughts removed": ("05_rl", "accuracy_without"),
    }
    return {label: _from_stage(Path(run), stage, key)[:3] for label, (stage, key) in rungs.items()}


def hand_over(stage: Stage, name: str) -> bool:
    """Copy a file of the stage beside the model in ``<run>/quietstar/``, if that is the run whose model was measured."""
    model = stage.run / "quietstar"
    if find_run(stage.params.upstream) != stage.run or not model.is_dir():
        return False
    shutil.copyfile(stage.path(name), model / name)
    return True


def model_card(board: list[dict], run: str | Path) -> ModelCard:
    """The card of ``quietstar/`` of a run: what the model is, its scores as they are, and how to load and ask it."""
    run = Path(run)
    record, _ = read_stage(run / "05_rl")
    problems = run / "02_dataset_generation" / "test.parquet"
    question = read_problems(problems)[0]["question"] if problems.is_file() else "how many ?"
    lines = [f"| {r['id']} | {r['criterion']} | {r['target']} | {figure_of(r)} | {verdict(r)} |" for r in board]
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["quiet-star", "reasoning", "reinforce"],
    )
    scores = "\n".join(
        ["| id | criterion | target | value [95 % interval] | outcome |", "|---|---|---|---|---|", *lines]
    )
    text = CARD.format(
        run=run.name,
        seed=record["seed"] if record else "unknown",
        scores=scores,
        question=json.dumps(question).replace("`", r"\u0060"),
    )
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
