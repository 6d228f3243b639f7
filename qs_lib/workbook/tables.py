"""What notebooks show besides figures: numbers gathered into rows, thoughts as HTML, files read back."""

import json
import os

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..data.strategies import PROMPTS, asked, strategy_of
from ..data.tokens import PLAIN_WORDS, THINKING_TOKENS, mark, marker_spellings, thinking_ids
from ..errors import UpstreamError
from ..evaluation.accuracy import answer_of, replies
from ..evaluation.episodes import by_problem
from ..evaluation.theater import CHECKS, TheaterReport
from ..files import find_run
from ..stats import as_text, correlation, fixed, named, shown
from ..training.baking import BakingItem
from ..viewing.escape import safe_text, safe_token


def committed(params, stage: str, name: str):
    """A ``.json`` or ``.jsonl`` file that the committed pocket run's stage wrote, to show beside a small live run.

    Empty where nothing is committed, and where ``params.upstream`` is given: then the notebook is itself a real run.
    """
    path = find_run("") / stage / name
    here = path.is_file() and not params.upstream
    if name.endswith(".jsonl"):
        return read_rows(path) if here else []
    return json.loads(path.read_text(encoding="utf-8")) if here else {}


def read_rows(path) -> list[dict]:
    """The rows of a JSON-lines file, such as a stage's ``metrics.jsonl``; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write_parquet(stage, name: str, rows: list[dict]) -> None:
    """Write rows into the stage's folder, aside first and then renamed, like all that a stage writes."""
    aside = stage.path(f".{name}.tmp")
    pq.write_table(pa.Table.from_pylist(list(rows)), aside)
    os.replace(aside, stage.path(name))


def side_by_side(columns: dict[str, dict], digits: int = 3) -> pd.DataFrame:
    """Dictionaries of numbers as columns of one table, empty ones left out; rows are the first one's keys."""
    columns = {name: values for name, values in columns.items() if values}
    keys = list(next(iter(columns.values())))
    return pd.DataFrame({n: [as_text(v.get(k, "-"), digits) for k in keys] for n, v in columns.items()}, index=keys)


def row_norms(model, tokenizer) -> dict:
    """Norms of the input rows: ``real`` (list, tokens that were there) and ``new`` (thinking token -> norm)."""
    weight = model.get_input_embeddings().weight.detach()[: len(tokenizer)]
    ids, norms = thinking_ids(tokenizer), weight.norm(dim=1).tolist()
    return {
        "real": [n for i, n in enumerate(norms) if i not in ids],
        "new": {t: norms[i] for t, i in zip(THINKING_TOKENS, ids, strict=True)},
    }


def nearest_tokens(model, tokenizer, count: int = 3) -> pd.DataFrame:
    """The ``count`` other tokens whose input rows point most nearly the same way as each thinking token's (cosine)."""
    weight = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach()[: len(tokenizer)], dim=1)
    ids = thinking_ids(tokenizer)
    cosine = weight[ids] @ weight.T
    cosine[:, ids] = -torch.inf
    best = cosine.topk(count, dim=1)
    rows = [
        [f"{tokenizer.decode([i]).strip()} ({c:.1f})" for i, c in zip(*pair, strict=True)]
        for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return pd.DataFrame(rows, index=list(THINKING_TOKENS), columns=[f"nearest {n + 1}" for n in range(count)])


def marked(reply: str) -> str:
    """A plain reply with thinking tokens in place of their words: ``think step 1 + 1 = 2 done`` -> ``<think> <step> ...``."""
    tokens = {word: token for token, word in PLAIN_WORDS.items()}
    return " ".join(tokens.get(word, word) for word in reply.split())


def aligned_tokens(item: BakingItem, tokenizer) -> pd.DataFrame:
    """What teacher and student have read last where a reply token is asked of both, and that token."""

    def word(ids, at):
        return tokenizer.decode([ids[at]]).strip()

    rows = [
        (word(item.teacher_ids, t), word(item.student_ids, s), tokenizer.decode([target]).strip())
        for t, s, target in zip(item.teacher_at, item.student_at, item.targets, strict=True)
    ]
    return pd.DataFrame(rows, columns=["teacher has read", "student has read", "both predict"])


def reply_rows(
    model, tokenizer, problems: list[dict], max_new_tokens: int = 48, prompts: dict[str, str] | None = None
) -> list[dict]:
    """One row per problem: the greedy ``reply``, its ``answer``, whether it is ``correct``, ``thinks``, which ``strategy``
    it uses ("none" without a thought) and whether that ``fits``. ``prompts``: strategy -> what to ask it with, in front of the question."""
    start, end = thinking_ids(tokenizer)[:2]
    contexts = [asked(p, prompts) if prompts else p["question"] for p in problems]
    rows = []
    for problem, written in zip(problems, replies(model, tokenizer, contexts, max_new_tokens), strict=True):
        ids, _ = mark(written, marker_spellings(tokenizer))  # a prompted champion writes the plain words
        thinks = bool(ids) and ids[0] == start and end in ids
        strategy = strategy_of(tokenizer.decode(ids[: ids.index(end)])) if thinks else None
        answer = answer_of(tokenizer, ids, (end,))
        rows.append(
            {
                "family": problem["family"],
                "reply": tokenizer.decode(written),
                "answer": answer,
                "thinks": thinks,
                "correct": answer == problem["answer"],
                "strategy": strategy or "none",
                "fits": strategy in (problem["fits"] or ["cot"]),
            }
        )
    return rows


def strategy_use(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Family -> strategy -> share of the family's replies (:func:`reply_rows`) that use it."""
    columns = ["cot", *(s for s in PROMPTS if s != "cot"), "none"]
    table = {}
    for family in dict.fromkeys(sorted(r["family"] for r in rows)):
        own = [r["strategy"] for r in rows if r["family"] == family]
        table[family] = {c: own.count(c) / len(own) for c in columns}
    return table


def thoughts_html(thoughts: list[dict]) -> str:
    """Thoughts as static HTML. Each dict: ``name``, ``tokens`` (text) and ``logprobs`` (nats; None for a forced token).

    The number under a token is its log-prob; the less likely the token was, the stronger its shade. All text is escaped.
    """
    lines = []
    for thought in thoughts:
        cells = []
        for token, x in zip(thought["tokens"], thought["logprobs"], strict=True):
            note, shade = "given" if x is None else fixed(x, 2), min(0.75, 0.25 * abs(x or 0))
            cells.append(
                f"<td style='text-align:center;padding:1px 3px;background:rgba(213,94,0,{shade:.2f})'>"
                f"{safe_token(token)}<br><small>{safe_text(note)}</small></td>"
            )
        total = sum(x or 0 for x in thought["logprobs"])
        lines.append(
            f"<tr><th scope='row'>{safe_text(thought['name'])}<br><small>sum {total:.1f}</small></th>{''.join(cells)}</tr>"
        )
    return f"<div style='overflow-x:auto'><table><tbody>{''.join(lines)}</tbody></table></div>"


def thought_records(thoughts, tokenizer, row: int = 0, position: int = 0) -> list[dict]:
    """The thoughts drawn at one position (``qs_lib.Thoughts``) for :func:`thoughts_html`."""
    records = []
    for k, n in enumerate(thoughts.lengths[row, position].tolist()):
        at = (row, position, k, slice(n))
        pairs = zip(thoughts.logprobs[at].tolist(), thoughts.sampled[at].tolist(), strict=True)
        records.append(
            {
                "name": f"thought {k + 1}",
                "tokens": [tokenizer.decode([t]) for t in thoughts.tokens[at].tolist()],
                "logprobs": [x if sampled else None for x, sampled in pairs],
            }
        )
    return records


def episode_table(episode) -> str:
    """The thoughts of a ``qs_lib.Episode`` as an HTML table: text, answer, mixing weight, coherence, utility (nats)."""
    rows = [
        {
            "thought": " ".join(t.strip() for t in thought.tokens),
            "answer": thought.answer.strip(),
            "weight": fixed(thought.weight, 2),
            "coherence": fixed(thought.coherence.get("composite", 0.0), 2),
            "utility": fixed(thought.utility, 1, True),
        }
        for thought in episode.thoughts
    ]
    with pd.option_context("display.max_colwidth", None):
        return pd.DataFrame(rows, index=[f"thought {k + 1}" for k in range(len(rows))]).to_html()


def model_latency(rows: list[dict]) -> pd.DataFrame:
    """Rows of ``latency.measure_models`` as a table: milliseconds, what dominates, and whether the target is met."""
    if not rows:
        return pd.DataFrame()
    keep = (
        "model",
        "text_length",
        "positions",
        "num_thoughts",
        "thought_length",
        "plain_ms",
        "median_ms",
        "p95_ms",
        "repeats",
    )
    table = pd.DataFrame([{key: row[key] for key in keep} for row in rows]).round(1)
    table["dominates"] = [
        f"{part} ({row['shares'][part]:.0%})" for row in rows for part in [max(row["shares"], key=row["shares"].get)]
    ]
    table["outcome"] = ["meets the target" if row["meets"] else "does not" for row in rows]
    return table


def bench() -> dict:
    """The committed file of `make bench`, empty where there is none."""
    path = find_run("").parent / "bench" / "thoughts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def bench_lines(result: dict) -> pd.DataFrame:
    """The promises of a bench file beside what was measured; what was missed says so."""
    words = {True: "reached", False: "NOT reached", None: "-"}
    rows = [
        {
            "claim": line["claim"],
            "shape": line["shape"],
            "kind": line["kind"],
            "bound": "-" if line["bound"] is None else f"{line['direction']} {line['bound']:g}",
            "measured": "not measured" if line["value"] is None else f"{line['value']:.3g}",
            "outcome": words[line["reached"]],
        }
        for line in result.get("lines", [])
    ]
    return pd.DataFrame(rows)


def committed_path(name: str):
    """The path of something in the committed pocket run. Raises ``UpstreamError`` where it is not there."""
    path = find_run("") / name
    if not path.exists():
        raise UpstreamError(
            f"the committed run lacks {name}: bring it back with `git checkout outputs/pocket` or `make refresh`"
        )
    return path


def verdicts(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """Every check against its target for each model, its outcome in words; "not made" where a model lacks it."""
    columns = {name: {c.id: f"{_value(c)} {_outcome(c)}" for c in one.checks} for name, one in reports.items()}
    targets = {c.id: c.target for one in reports.values() for c in one.checks}
    return pd.DataFrame({"target": targets, **columns}).reindex([i for i in CHECKS if i in targets]).fillna("not made")


def parts(report: TheaterReport, seed: int = 0) -> pd.DataFrame:
    """Correlation with utility of coherence and of each part of it, pooled and inside problems, with intervals."""
    utility, rows = by_problem(report.table, "utility"), {}
    for name in ("composite", "semantic", "syntactic", "predictive"):
        score = by_problem(report.table, name)
        rows[name] = {
            "pooled r": shown(correlation(score, utility, seed), signed=True),
            "within problems": shown(correlation(score, utility.clip(-5, 5), seed, within=True), signed=True),
        }
    return pd.DataFrame(rows).T


def reliabilities(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """Calibration error and preference for right thoughts of each score of each model."""
    rows = {
        (model, score): {
            "calibration error": shown(r.error),
            "right before wrong": shown(r.preference),
            "problems with both": r.disputed,
        }
        for model, one in reports.items()
        for score, r in one.reliability.items()
    }
    return pd.DataFrame(rows).T


def stages(reports: dict[str, TheaterReport]) -> pd.DataFrame:
    """The models side by side, in the order given: what each stage of training adds."""
    columns = {}
    for name, one in reports.items():
        made = {c.id: _value(c) for c in one.checks}
        columns[name] = {
            "accuracy with own thoughts": shown(one.accuracy["own"]),
            "without thoughts": shown(one.accuracy["none"]),
            "own minus none": made["ablation_gain"],
            "own minus foreign": made["foreign_gain"],
            "coherence against utility, r": made["coherence_utility_r"],
            "the same within problems": shown(one.within_r),
            "distance between thoughts": fixed(one.diversity[0]),
            "gain over the stage before": made.get("training_gain", "-"),
            "checks reached": f"{len(one.checks) - len(one.missed)} of {len(one.checks)}",
        }
    return pd.DataFrame(columns)


def turned_red(planted: TheaterReport, honest: TheaterReport) -> list[str]:
    """Ids of the checks that a planted cheat misses and the honest model passes: what caught it."""
    passed = {c.id for c in honest.checks if c.reached}
    return [i for i in planted.missed if i in passed]


def summary(report: TheaterReport) -> dict[str, float]:
    """The numbers of a report for the stage's ``run.json``, those with an interval as ``name``, ``_low``, ``_high``."""
    out = {}
    for c in report.checks:
        out |= named(c.id, (c.value, c.low, c.high))
    out |= {f"accuracy_{attack}": value[0] for attack, value in report.accuracy.items()}
    for name in ("within_r", "diversity", "matched_divergence"):
        out |= named(name, getattr(report, name))
    for name, one in report.reliability.items():
        out |= named(f"{name}_calibration_error", one.error) | named(f"{name}_preference", one.preference)
    return out | {"checks_reached": len(report.checks) - len(report.missed), "checks": len(report.checks)}


def _value(check) -> str:
    return shown((check.value, check.low, check.high))


def _outcome(check) -> str:
    return "reached" if check.reached else "open" if check.undecided else "not reached"
