"""Word problems from anywhere, as one kind of record: ``Problem``."""

import json
import random
import re
import urllib.error
import urllib.request
from pathlib import Path

from datasets import Dataset, DownloadConfig, load_dataset
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from ..errors import HubError, SourceError, WorkbookError, at_least
from . import Problem, pocket
from .strategies import exact_value, fitting, result

HUB_NAMES = {"gsm8k": ("openai/gsm8k", "main")}
HARD_FROM = 3  # worked steps
LONGEST_LINE = 1_000_000  # bytes
HUB_TIMEOUT = 3.0  # seconds
_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*|-?\.\d+")


def load_problems(
    source: str = "pocket", split: str = "train", limit: int | None = None, seed: int = 0, distinct: bool = True
) -> Dataset:
    """Load problems of ``split`` (train, validation or test) as a ``datasets.Dataset`` of ``Problem`` records.

    ``source`` is ``"pocket"`` (generated: ``limit`` of them, 2,000 by default, which may repeat unless ``distinct``),
    ``"gsm8k"`` (from the hub), a folder with ``train.jsonl`` and ``test.jsonl``, or one ``.jsonl`` file. Each line of a
    file holds ``question`` and ``answer`` in GSM8K's form: ``#### 42`` at the end, ``<<48/2=24>>`` around worked steps.
    Where data has no validation split, every tenth training problem by the MD5 of its question is held out for it.
    Raises ``SourceError``, ``HubError`` or ``WorkbookError`` with one sentence that says what to do.
    """
    if split not in ("train", "validation", "test"):
        raise WorkbookError(f"split is {split!r}; it must be train, validation or test")
    at_least(1, limit=1 if limit is None else limit)
    if source == "pocket":
        return Dataset.from_list(pocket.generate(split, limit or 2000, seed, distinct))
    problems = _read_source(source, split)
    if split != "test" and not source.endswith(".jsonl"):
        wanted = split == "validation"
        problems = [p for p in problems if (pocket.split_of(p["question"]) == "validation") == wanted]
    if not problems:
        raise WorkbookError(f"{source} holds no {split} problems")
    return Dataset.from_list(problems[:limit])


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


def _read_source(source: str, split: str) -> list[Problem]:
    path, name = Path(source), "test" if split == "test" else "train"
    if source in HUB_NAMES:
        return _from_hub(source, name)
    if path.is_dir():
        path = path / f"{name}.jsonl"
    if not path.is_file():
        raise SourceError(
            f"no problems at {path}: give 'pocket', 'gsm8k', a folder with train.jsonl and test.jsonl, or a .jsonl file"
        )
    problems = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            problems.append(_parse_line(line))
        except WorkbookError as error:
            raise WorkbookError(f"{path}:{number}{error}") from None
    return problems


def _parse_line(line: bytes) -> Problem:
    """Parse one line of a .jsonl file. Raises ``WorkbookError`` with what follows the line's number."""
    if len(line) > LONGEST_LINE:
        raise WorkbookError(f" has {len(line):,} bytes; a problem may have {LONGEST_LINE:,}")
    try:
        row = json.loads(line)
        question, answer = row["question"], row["answer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WorkbookError(f" is not a JSON object with question and answer ({str(error)[:100]})") from None
    if not isinstance(question, str) or not isinstance(answer, str):
        raise WorkbookError(": question and answer must be text")
    try:
        f"{question}{answer}".encode()
        return parse_gsm8k(question, answer)
    except UnicodeEncodeError:
        raise WorkbookError(": the text is not valid Unicode") from None
    except WorkbookError as error:
        raise WorkbookError(f": {error}") from None


def _from_hub(source: str, split: str) -> list[Problem]:
    """Read a data set from the hub, or the copy that was downloaded before where the hub does not answer."""
    name, there = HUB_NAMES[source][0], hub_answers()
    try:
        config = DownloadConfig(local_files_only=not there)
        rows = load_dataset(*HUB_NAMES[source], split=split, download_config=config)
        return [parse_gsm8k(row["question"], row["answer"]) for row in rows]
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = f"({type(error).__name__})" if there else "and no copy of it was downloaded before"
        raise HubError(
            f"the hub is out of reach for {name} {reason}: download its train.jsonl and test.jsonl once and give their "
            "folder instead (make run P=... DATA=folder, or data=folder in the notebook)"
        ) from None


def parse_gsm8k(question: str, worked: str) -> Problem:
    """Parse a GSM8K question and its worked answer. Raises ``WorkbookError`` without a final ``####`` number.

    Difficulty is the number of worked steps: annotated equations, or text lines where none is annotated. ``steps``
    keeps the equations only if all of them are true arithmetic and the last one gives the answer. Else it is empty.
    """
    text, mark, final = worked.rpartition("####")
    number = _NUMBER.search(final)
    if not mark or number is None:
        raise WorkbookError(f"no '#### number' at the end of the worked answer to {question[:60]!r}")
    answer = plain_number(number.group())
    steps = [_equation(*m) for m in _ANNOTATION.findall(text)]
    difficulty = len(steps) or max(1, len([line for line in text.splitlines() if line.strip()]))
    if None in steps or not steps or result(steps[-1]) != answer:
        steps = []
    problem = {"question": question.strip(), "answer": answer, "steps": steps, "difficulty": difficulty}
    return problem | {"family": "gsm8k", "fits": fitting(steps) if steps else [], "lead": []}


def _equation(left: str, right: str) -> str | None:
    """Turn ``48/2`` and ``24`` into ``48 / 2 = 24``, or None unless it is true plain arithmetic (to a cent)."""
    left = re.sub(r"\s*([-+*/()])\s*", r" \1 ", left.replace(",", "").replace("$", "")).strip()
    try:
        right = plain_number(right)
        true = abs(exact_value(left) - exact_value(right)) <= 0.01
    except ValueError:
        return None
    return f"{' '.join(left.split())} = {right}" if true else None


def plain_number(text: str) -> str:
    """Turn ``1,200.50`` into ``1200.5`` and ``18.00`` into ``18``. Raises ``WorkbookError`` beyond 10^15."""
    text = text.replace(",", "").replace("$", "").strip()
    value = float(text)
    if abs(value) > 1e15:
        raise WorkbookError(f"{text[:20]}... is too large a number")
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def hub_answers() -> bool:
    """Whether the hub may be used (``HF_HUB_OFFLINE`` is not set) and answers within ``HUB_TIMEOUT`` seconds at all."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answers, if only that it does not like the question
    except (OSError, ValueError):
        return False
    return True
