"""Word problems from anywhere, as one kind of record: ``Problem``."""

import contextlib
import json
import os
import random
import re
import urllib.error
import urllib.request
from numbers import Integral
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from ..errors import HubError, SourceError, WorkbookError
from . import Problem, pocket, templates
from .answers import written_number
from .strategies import fitting, holds, result
from .tokens import untagged

HUB_NAMES = {
    "gsm8k": ("openai/gsm8k", "main"),
    "svamp": ("ChilleD/SVAMP", "default"),
    "asdiv": ("MU-NLPC/Calc-asdiv_a", "default"),
}
TEST_ALONE = {"asdiv"}  # the hub has no other split of it, so that one gives all three
HARD_FROM = 3  # worked steps
LONGEST_LINE = 1_000_000  # bytes
HUB_TIMEOUT = 3.0  # seconds
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")
_WORKING = re.compile(r"(?<![\w.,)])[($]*\d[\d\s.,$%()+*/x×÷-]*=\s*(\$?)\s*(?=<<)")  # a calculation up to its result
OTHER_NAMES = ("valid", "val", "dev", "eval", "validate")  # of a validation split, which would not be read


def load_problems(
    source: str | Path = "pocket", split: str = "train", limit: int | None = None, seed: int = 0, distinct: bool = True
):
    """Load problems of ``split`` (train, validation or test) as a ``datasets.Dataset`` of ``Problem`` records.

    ``source`` is ``"pocket"`` (generated: ``limit`` of them, 2,000 by default), ``"gsm8k"``, ``"svamp"`` or ``"asdiv"``
    (from the hub), a folder with ``train.jsonl`` and ``test.jsonl``, or one ``.jsonl`` file. Each line of a file holds
    ``question`` and ``answer`` in GSM8K's form: ``#### 42`` at the end, ``<<48/2=24>>`` around worked steps. It may
    have the columns of SVAMP or Calc-ASDiv instead. A repeated problem comes once if ``distinct``.

    A ``.csv`` file of templates (``data.templates``), or a folder with one, is split by template. Its training split is
    filled up to ``limit`` with redrawn problems, which ``seed`` draws.

    A folder's ``validation.jsonl`` is its validation split. Without one, every tenth training problem by the MD5 of its
    question is held out for it. One file gives all three splits in the same way, every tenth problem for the test.
    Raises ``SourceError``, ``HubError`` or ``WorkbookError`` with one sentence that says what to do.
    """
    from datasets import Dataset  # the better part of a second, which most commands need not wait

    if split not in ("train", "validation", "test"):
        raise WorkbookError(f"split is {split!r}; it must be train, validation or test")
    if limit is not None and (not isinstance(limit, Integral) or limit < 1):
        raise WorkbookError(f"limit is {limit!r}; it must be a whole number from 1, or None for all")
    source = str(source)
    if source == "pocket":
        return Dataset.from_list(pocket.generate(split, 2000 if limit is None else limit, seed, distinct))
    table = None if source in HUB_NAMES else templates.table_of(source)
    problems = templates.problems_of(table, split) if table else _of_split(source, split)
    if not problems:
        raise WorkbookError(f"{source} holds no {split} problems: give a folder with a file for each split")
    first = {}
    for p in problems:
        first.setdefault(p["question"], p)
    problems = (list(first.values()) if distinct else problems)[:limit]
    if table and split == "train" and limit and limit > len(problems):
        problems += templates.redrawn(table, limit - len(problems), set(first), seed)
    return Dataset.from_list(problems)


def _of_split(source: str, split: str) -> list[Problem]:
    """Read the problems of a split from the hub, a folder or a file, and hold out what has no file of its own."""
    name = "test" if split == "test" or source in TEST_ALONE else "train"
    held_out = {"validation", "test"} if source in TEST_ALONE else set() if split == "test" else {"validation"}
    if source in HUB_NAMES:
        problems = _from_hub(source, name)
    else:
        path = Path(os.path.expanduser(source))  # Path's own raises for an unknown user's home
        if path.is_file():
            held_out = {"validation", "test"}
        elif unread := [f for other in OTHER_NAMES for f in path.glob(f"{other}.jsonl")]:
            raise SourceError(f"{unread[0]} would not be read: call it validation.jsonl")
        elif (path / "validation.jsonl").is_file():
            name, held_out = split, set()
        problems = _read_file(path / f"{name}.jsonl" if path.is_dir() else path)

    def belongs(p: Problem) -> bool:
        by = templates.split_of_template if p["family"] == templates.FAMILY else pocket.split_of
        falls = by(p["question"])
        return (falls if falls in held_out else "train") == split

    return [p for p in problems if belongs(p)] if held_out else problems


def limit_hard(problems: list[Problem], share: float, seed: int = 0) -> list[Problem]:
    """Return the problems with about ``share`` of those of ``HARD_FROM`` steps or more, in order, drawn by ``seed``.

    Worked solutions of hard problems are dear and their answers are cheap. Baking learns from worked solutions of what
    this leaves, reinforcement learning from answers of all problems.
    """
    rng = random.Random(seed)
    return [p for p in problems if p["difficulty"] < HARD_FROM or rng.random() < share]


def baking_data(examples, train, count: int, hard_shown: float, seed: int = 0) -> tuple[list[dict], list[Problem]]:
    """Return ``count`` of the worked examples, and training problems without one for the prompted teacher to solve.

    Of fewer examples it takes all. Of the hard problems the teacher gets ``hard_shown``.
    """
    worked = random.Random(seed).sample(examples, min(count, len(examples)))
    with_example = {e["question"] for e in examples}
    return worked, limit_hard([p for p in train if p["question"] not in with_example], hard_shown, seed=seed)


def _read_file(path: Path) -> list[Problem]:
    if not path.is_file():
        files = "a folder with train.jsonl and test.jsonl, a .jsonl file, or a .csv file of templates"
        raise SourceError(f"no problems at {path}: give 'pocket', 'gsm8k', {files}")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    problems, told = [], {}  # question -> the line that asks it first, and its answer
    for number, line in enumerate(lines, 1):
        try:
            p = _parse_line(line)
            before, answer = told.setdefault(p["question"], (number, p["answer"]))
            if answer != p["answer"]:
                same = f"{answer} to the same question in line {before}"
                raise WorkbookError(f": the answer is {p['answer']}, and {same}")
        except WorkbookError as error:
            raise WorkbookError(f"{path}:{number}{error}") from None
        problems.append(p)
    return problems


def _parse_line(line: bytes) -> Problem:
    """Parse one line of a .jsonl file. Raises ``WorkbookError`` with what follows the line's number."""
    if len(line) > LONGEST_LINE:
        raise WorkbookError(f" has {len(line):,} bytes; a problem may have {LONGEST_LINE:,}")
    try:
        row = json.loads(line, object_pairs_hook=_unique)
        question, answer, family = templates.told(row)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WorkbookError(f" is not a JSON object with question and answer ({str(error)[:100]})") from None
    if not isinstance(question, str) or not isinstance(answer, str):
        raise WorkbookError(": question and answer must be text")
    if not question.strip():
        raise WorkbookError(": the question is blank")
    try:
        f"{question}{answer}".encode()
        return parse_gsm8k(question, answer, family)
    except UnicodeEncodeError:
        raise WorkbookError(": the text is not valid Unicode") from None
    except WorkbookError as error:
        raise WorkbookError(f": {error}") from None


def _unique(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _from_hub(source: str, split: str) -> list[Problem]:
    """Read a data set from the hub, or the copy that was downloaded before where the hub does not answer."""
    from datasets import DownloadConfig, load_dataset

    name, there, offline = HUB_NAMES[source][0], hub_answers(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not there  # else it is asked for the copy too, five times
    try:
        rows = load_dataset(*HUB_NAMES[source], split=split, download_config=DownloadConfig(local_files_only=not there))
        problems = []
        for row in rows:
            with contextlib.suppress(WorkbookError if source in TEST_ALONE else ()):  # an answer such as 1/3
                problems.append(parse_gsm8k(*templates.told(row)))
        return problems
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = f"({type(error).__name__})" if there else "and no copy of it was downloaded before"
        raise HubError(
            f"the hub is out of reach for {name} {reason}: download its train.jsonl and test.jsonl once and give their "
            "folder instead (make run P=... DATA=folder, or data=folder in the notebook)"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = offline


def parse_gsm8k(question: str, worked: str, family: str = "gsm8k") -> Problem:
    """Parse a GSM8K question and its worked answer. Raises ``WorkbookError`` without one number after ``####``.

    Difficulty is the number of worked steps: annotated equations, or text lines where none is annotated. ``steps``
    keeps the equations only if all of them are true arithmetic and the last one gives the answer. Else it is empty.
    """
    text, mark, final = worked.rpartition("####")
    if not mark or not any(c.isnumeric() for c in final):
        raise WorkbookError(f"no '#### number' at the end of the worked answer to {question[:60]!r}")
    answer = written_number(final)
    steps = [_equation(*m) for m in _ANNOTATION.findall(text)]
    difficulty = len(steps) or max(1, len([line for line in text.splitlines() if line.strip()]))
    if None in steps or not steps or result(steps[-1]) != answer:
        steps = []
    problem = {"question": question.strip(), "answer": answer, "steps": steps, "difficulty": difficulty}
    return problem | {"family": family, "fits": fitting(steps) if steps else [], "lead": []}


def solution_text(question: str, worked: str, working: bool = True) -> Problem:
    """Return a GSM8K question and its worked answer as running text: a story as ``pocket.stories`` writes them.

    Annotations go, and without ``working`` the calculations before results too. A result is a sentence (``answer``) whose
    equations (``steps``) are all true, ``before`` is the text up to it. Raises as :func:`parse_gsm8k` does.
    """
    opening, results, worked = " ".join(question.split()), [], untagged(worked)
    text = opening
    for line in worked.rpartition("####")[0].splitlines():
        said = line if working else _WORKING.sub(r"\1", line)
        said, steps = " ".join(_ANNOTATION.sub("", said).split()), [_equation(*m) for m in _ANNOTATION.findall(line)]
        if steps and None not in steps:
            results.append({"before": text, "answer": said, "steps": steps})
        text = f"{text} {said}".strip()
    return parse_gsm8k(question, worked) | {"question": opening, "story": text[len(opening) + 1 :], "results": results}


def _equation(left: str, right: str) -> str | None:
    """Turn ``48/2`` and ``24`` into ``48 / 2 = 24``, or None unless it is true plain arithmetic (to a cent)."""
    left = re.sub(r"\s*([-+*/()])\s*", r" \1 ", left.replace(",", "").replace("$", "")).strip()
    try:
        left = re.sub(r"\d*\.?\d+", lambda number: written_number(number[0]), left)  # 1.50 is 1.5
        right = written_number(right)
        true = holds(f"{left} = {right}")
    except ValueError:
        return None
    return f"{' '.join(left.split())} = {right}" if true else None


def hub_answers() -> bool:
    """Whether the hub may be used (``HF_HUB_OFFLINE`` is not set) and answers within ``HUB_TIMEOUT`` seconds at all."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except (OSError, ValueError) as error:
        return isinstance(error, urllib.error.HTTPError)  # it answers, if only that it does not like the question
    return True
