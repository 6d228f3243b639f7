"""What notebooks show besides figures: numbers gathered into rows, thoughts as HTML, files read back."""

import json
import textwrap

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from IPython import get_ipython

from ..data.strategies import PROMPTS, asked
from ..data.tokens import PLAIN_WORDS, THINKING_TOKENS, thinking_ids
from ..errors import UpstreamError
from ..evaluation.accuracy import read_replies, replies
from ..evaluation.episodes import by_problem
from ..evaluation.theater import CHECKS, TheaterReport
from ..files import atomic_write, find_run
from ..stats import as_text, correlation, fixed, named, shown
from ..training.baking import BakingItem
from ..viewing.escape import safe_text, safe_token
from ..viewing.html import PARTS, left, shade

LEFT = "<style>.qs-left :is(th, td) {text-align: left !important}</style>"


def committed(params, stage: str, name: str):
    """Return a ``.json`` or ``.jsonl`` file that the committed pocket run's stage wrote, to show beside a small run.

    It is empty where nothing is committed, and where ``params.upstream`` is given, when the notebook is a real run.
    """
    if name.endswith(".jsonl"):
        return [] if params.upstream else read_json_lines(find_run("") / stage / name)
    return {} if params.upstream else _read_json(find_run("") / stage / name)


def as_html(frame: pd.DataFrame) -> str:
    """Return a table with its text in full and on the left. Jupyter aligns to the right, which suits numbers alone."""
    if frame.columns.name is None and frame.index.nlevels == 1:  # its name takes no line of its own
        frame = frame.rename_axis(index=None, columns=frame.index.name)
    with pd.option_context("display.max_colwidth", None):
        return LEFT + left(frame.to_html(classes="qs-left", justify="left"))


if (shell := get_ipython()) is not None:  # how a notebook shows every table
    shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, as_html)


def wrapped(*lines: str, indent: int = 4) -> str:
    """Return lines of 100 characters, broken between words. Jupyter breaks what is longer inside of words."""
    wrap = textwrap.TextWrapper(100, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(line) for line in lines)


def _read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_json_lines(path) -> list[dict]:
    """Return the rows of a JSON-lines file, such as a stage's ``metrics.jsonl``, and none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def read_bench() -> dict:
    """Return the committed file of ``make bench``, empty where there is none."""
    return _read_json(find_run("").parent / "bench" / "thoughts.json")


def committed_path(name: str):
    """Return the path of something in the committed pocket run. Raises ``UpstreamError`` where it is not there."""
    if not (path := find_run("") / name).exists():
        again = "`git checkout outputs/pocket` or `make refresh`"
        raise UpstreamError(f"the committed run lacks {name}: bring it back with {again}")
    return path


def write_parquet(stage, name: str, rows: list[dict]) -> None:
    """Write rows into the stage's folder, whole or not at all. Raises ``StageError``."""
    with atomic_write(stage.path(name)) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary)


def side_by_side(columns: dict[str, dict], digits: int = 3, names: dict[str, str] | None = None) -> pd.DataFrame:
    """Return dictionaries of numbers as columns, an interval in a cell. Rows are the first one's keys, or ``names``."""
    columns = {name: values for name, values in columns.items() if values}
    rows = names or {k: k for k in next(iter(columns.values())) if not k.endswith(("_low", "_high"))}

    def cell(values: dict, key: str) -> str:
        ends = [values.get(key + end) for end in ("", "_low", "_high")]
        signed = "gain" in key or "over" in key  # a difference
        if type(ends[0]) is int:
            return f"{ends[0]:,}"
        return as_text(values.get(key, "-"), digits) if None in ends else shown(ends, signed, digits)

    return pd.DataFrame({n: [cell(v, k) for k in rows] for n, v in columns.items()}, index=list(rows.values()))


def gain_told(summary: dict, problems: int) -> str:
    """Return what the summary of 05_rl says of thoughts before and after it, and whether its interval decides it."""
    gain = [summary[f"accuracy_gain{end}"] for end in ("", "_low", "_high")]
    before, after = (fixed(summary[name], 2) for name in ("accuracy_baseline", "accuracy_with"))
    told = "a gain" if gain[1] > 0 else "a loss" if gain[2] < 0 else "too few to tell a gain from a loss"
    return f"{before} -> {after} on {problems} test problems, {shown(gain, True, 2)}: {told}"


def embedding_norms(model, tokenizer) -> dict:
    """Return norms of the input rows: ``real`` (list, tokens that were there) and ``new`` (thinking token -> norm)."""
    weight = model.get_input_embeddings().weight.detach()[: len(tokenizer)]
    ids, norms = thinking_ids(tokenizer), weight.norm(dim=1).tolist()
    new = {token: norms[i] for token, i in zip(THINKING_TOKENS, ids, strict=True)}
    return {"real": [norm for i, norm in enumerate(norms) if i not in ids], "new": new}


def nearest_tokens(model, tokenizer) -> pd.DataFrame:
    """Return the three other tokens whose input rows are nearest to each thinking token's (cosine)."""
    weight = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach()[: len(tokenizer)], dim=1)
    ids = thinking_ids(tokenizer)
    cosine = weight[ids] @ weight.T
    cosine[:, ids] = -torch.inf
    near = zip(*(found.tolist() for found in cosine.topk(3, dim=1)), strict=True)
    rows = [[f"{tokenizer.decode([i]).strip()} ({c:.1f})" for c, i in zip(*row, strict=True)] for row in near]
    return pd.DataFrame(rows, index=list(THINKING_TOKENS), columns=["nearest 1", "nearest 2", "nearest 3"])


def marked(reply: str) -> str:
    """Return a plain reply with thinking tokens in place of their words: ``think step 1`` -> ``<think> <step> 1``."""
    tokens = {word: token for token, word in PLAIN_WORDS.items()}
    return " ".join(tokens.get(word, word) for word in reply.split())


def aligned_tokens(item: BakingItem, tokenizer) -> pd.DataFrame:
    """Return what teacher and student have read last where a reply token is asked of both, and that token."""
    columns = {"teacher has read": [item.teacher_ids[at] for at in item.teacher_at]}
    columns |= {"student has read": [item.student_ids[at] for at in item.student_at], "both predict": item.targets}
    return pd.DataFrame(columns).map(lambda i: tokenizer.decode([i]).strip())


def reply_rows(model, tokenizer, problems, max_new_tokens=48, prompts: dict | None = None, forbid=()) -> list[dict]:
    """Return one row per problem from its greedy reply.

    A row holds the ``family``, the ``reply`` and what ``read_replies`` reads in it. ``prompts``: strategy -> what
    stands in front of the question. ``forbid``: ids that may not be written.
    """
    contexts = [asked(p, prompts) if prompts else p["question"] for p in problems]
    written = replies(model, tokenizer, contexts, max_new_tokens, forbid)
    said = [{"family": p["family"], "reply": tokenizer.decode(w)} for p, w in zip(problems, written, strict=True)]
    return [one | row for one, row in zip(said, read_replies(tokenizer, problems, written), strict=True)]


def strategy_use(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Return family -> strategy -> share of the family's replies (:func:`reply_rows`) that use it."""
    columns, frame = ["cot", *(s for s in PROMPTS if s != "cot"), "none"], pd.DataFrame(rows)
    shares = pd.crosstab(frame["family"], frame["strategy"], normalize="index")
    return shares.reindex(columns=columns, fill_value=0.0).to_dict("index")


def thoughts_html(thoughts, tokenizer) -> str:
    """Return the thoughts drawn at the first position (``qs_lib.Thoughts``) as static HTML, all text escaped.

    The number under a token is its log-prob in nats. The less likely it was, the stronger its shade.
    """
    rows = []
    for k, n in enumerate(thoughts.lengths[0, 0].tolist()):
        drawn = [x[0, 0, k, :n].tolist() for x in (thoughts.tokens, thoughts.logprobs, thoughts.sampled)]
        total = fixed(sum(drawn[1]), 1)
        cells = f"<th scope='row'>thought {k + 1:d}<br><small>sum {safe_text(total)}</small></th><td>"
        for token, x, sampled in zip(*drawn, strict=True):
            cells += "<span style='display:inline-block;text-align:center;padding:1px 3px;background:"
            cells += f"{shade(min(0.75, 0.25 * abs(x)))}'>{safe_token(tokenizer.decode([token]))}<br>"
            cells += f"<small>{safe_text(fixed(x, 2)) if sampled else 'given'}</small></span>"
        rows.append(cells + "</td>")
    return LEFT + left(f"<table class='qs-left'><tbody><tr>{'</tr><tr>'.join(rows)}</tr></tbody></table>")


def answers_over_steps(episodes: list) -> pd.DataFrame:
    """Return a row per problem and a column per step of training: the answer, and in brackets each thought's alone."""
    rows = {}
    for e in sorted(episodes, key=lambda e: (e.problem, e.step)):
        row = rows.setdefault(e.problem + 1, {"question": e.question, "truth": e.answer})
        row[f"step {e.step}"] = f"{e.answer_with} ({' '.join(t.answer for t in e.thoughts)})"
    return pd.DataFrame(rows).T.fillna("-")


def model_latency_table(rows: list[dict]) -> pd.DataFrame:
    """Return rows of ``model_sizes.measure_models`` as a table: milliseconds, what dominates, the target met or not."""
    names = {"model": "model", "text_length": "text", "positions": "places", "num_thoughts": "thoughts"}
    names |= {"thought_length": "tokens", "plain_ms": "plain_ms", "median_ms": "median_ms", "p95_ms": "p95_ms"}
    table = pd.DataFrame(rows).rename(columns=names)[[*names.values(), "repeats"]].round(1)
    largest = [max(row["shares"].items(), key=lambda one: one[1]) for row in rows]
    table["dominates"] = [f"{part} ({share:.0%})" for part, share in largest]
    table["outcome"] = ["meets the target" if row["meets"] else "does not" for row in rows]
    return table


def bench_lines(result: dict) -> pd.DataFrame:
    """Return the promises of a bench file beside what was measured. What was missed says so."""
    rows, words = [], {True: "reached", False: "NOT reached", None: "-"}
    for line in result.get("lines", []):
        row = {name: line[name] for name in ("claim", "shape", "kind")}
        row["bound"] = "-" if line["bound"] is None else f"{line['direction']} {line['bound']:g}"
        row["measured"] = "not measured" if line["value"] is None else f"{line['value']:.3g}"
        rows.append(row | {"outcome": words[line["reached"]]})
    return pd.DataFrame(rows)


def verdicts(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """Return every check against its target for each model, its outcome in words, "not made" where a model lacks it."""
    columns = {"target": {c.id: c.target for one in reports.values() for c in one.checks}}
    for name, one in reports.items():
        told = {c.id: "reached" if c.reached else "open" if c.undecided else "not reached" for c in one.checks}
        columns[name] = {c.id: f"{shown((c.value, c.low, c.high))} {told[c.id]}" for c in one.checks}
    return pd.DataFrame(columns).reindex([i for i in CHECKS if i in columns["target"]]).fillna("not made")


def coherence_parts(report: TheaterReport, seed: int = 0) -> pd.DataFrame:
    """Return the correlation with utility of coherence and of each part of it, pooled and inside problems."""
    utility, rows = by_problem(report.table, "utility"), {}
    for name in PARTS:
        score = by_problem(report.table, name)
        within = correlation(score, utility, seed, within=True)
        pooled = correlation(score, utility, seed)
        rows[name] = {"pooled r": shown(pooled, signed=True), "within problems": shown(within, signed=True)}
    return pd.DataFrame(rows).T


def reliabilities(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """Return calibration error and preference for right thoughts of each score of each model."""
    rows = {(model, score): r for model, one in reports.items() for score, r in one.reliability.items()}
    columns = ("calibration error", "right before wrong", "problems with both")
    values = [(shown(r.error), shown(r.preference), r.disputed) for r in rows.values()]
    return pd.DataFrame(values, pd.MultiIndex.from_tuples(rows), columns, dtype=object)


def stages(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """Return the models side by side, in the order given: what each stage of training adds."""
    columns = {}
    for name, one in reports.items():
        made, accuracy = {c.id: shown((c.value, c.low, c.high)) for c in one.checks}, one.accuracy
        rows = {"accuracy with own thoughts": shown(accuracy["own"]), "without thoughts": shown(accuracy["none"])}
        rows |= {"own minus none": made["ablation_gain"], "own minus foreign": made["foreign_gain"]}
        rows |= {"coherence against utility, r": made["coherence_utility_r"]}
        rows |= {"the same within problems": shown(one.within_r), "distance between thoughts": fixed(one.diversity[0])}
        rows |= {"gain over the stage before": made.get("training_gain", "-")}
        columns[name] = rows | {"checks reached": f"{len(one.checks) - len(one.missed)} of {len(one.checks)}"}
    return pd.DataFrame(columns)


def turned_red(planted: TheaterReport, honest: TheaterReport) -> list[str]:
    """Return the ids of the checks that a planted cheat misses and the honest model passes: what caught it."""
    passed = {c.id for c in honest.checks if c.reached}
    return [i for i in planted.missed if i in passed]


def theater_summary(report: TheaterReport) -> dict[str, float]:
    """Return a report's numbers for the stage's ``run.json``. An interval is ``name``, ``name_low``, ``name_high``."""
    out = {}
    for c in report.checks:
        out |= named(c.id, (c.value, c.low, c.high))
    out |= {f"accuracy_{attack}": value[0] for attack, value in report.accuracy.items()}
    for name in ("within_r", "diversity", "matched_divergence"):
        out |= named(name, getattr(report, name))
    for name, one in report.reliability.items():
        out |= named(f"{name}_calibration_error", one.error) | named(f"{name}_preference", one.preference)
    return out | {"checks_reached": len(report.checks) - len(report.missed), "checks": len(report.checks)}
