"""Notebook parameters: checked once, named once, frozen.

Papermill injects any name it is given, with a warning only, and a YAML file's ``1e-4`` arrives as a string. The second
cell of every notebook therefore reads ``P = Baking.from_notebook(globals())``: a misspelt name, a wrong type or an
impossible value stops the notebook with one sentence. The run driver asks the same question before papermill sees
anything (:func:`check_parameters`), because papermill runs code written in a parameter's *name*.
"""

import ast
import json
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from ..errors import ParameterError
from ..files import REPOSITORY, RUN_NAME
from ..settings import Settings, unknown_name
from ..training.settings import BakingSettings, PretrainSettings, QuietStarSettings


class NotebookParams(Settings):
    """What every notebook takes. Each adds its own in a subclass below, on top of the settings of its training."""

    seed: int = Field(0, ge=0, lt=2**32)
    run_name: str = Field(pattern=RUN_NAME)
    upstream: str = ""

    @classmethod
    def from_notebook(cls, namespace: dict) -> "NotebookParams":
        """The parameters of the running notebook, from its ``globals()``. Raises ``ParameterError``.

        Names come from the class and from the cell papermill injected (found in IPython's ``In``), so that other
        variables of a long JupyterLab session do not count as parameters.
        """
        cells = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
        names = set(cls.model_fields)
        for statement in ast.parse(cells[-1]).body if cells else []:
            names |= {target.id for target in getattr(statement, "targets", []) if isinstance(target, ast.Name)}
        return cls(**{name: namespace[name] for name in names if name in namespace})


def notebook_parameters(notebook: str | Path) -> dict:
    """Names and default values in the notebook's ``parameters`` cell. Raises ParameterError.

    Read here, not by papermill's own inspection: that misses names whose comment holds an ``=``.
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        raise ParameterError(f"there is no notebook {notebook}") from None
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    values = {}
    try:
        for statement in ast.parse("".join(tagged[0]["source"]) if tagged else "").body:
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            values[target.id] = ast.literal_eval(statement.value)
    except (AttributeError, SyntaxError, ValueError):
        raise ParameterError(f"{notebook}: the parameters cell may hold literals only") from None
    return values


def check_parameters(notebook: str | Path, given: dict) -> dict:
    """Return all parameters of the notebook, defaults included, as plain JSON values. Raises ParameterError.

    A notebook that is not one of the workbook's (no class below) has its names checked only.
    """
    defaults = notebook_parameters(notebook)
    for name in given:
        if name not in defaults:
            raise ParameterError(unknown_name(str(name), defaults))
    values = defaults | given
    if model := NOTEBOOKS.get(Path(notebook).stem):
        return model(**values).model_dump(mode="json")
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError):
        raise ParameterError("parameters must be plain numbers, text, true/false or lists of these") from None


class Source(NotebookParams):
    """Parameters of notebooks that load problems: where from, and how many of them."""

    source: str = "pocket"
    data: str = ""
    train_problems: int = Field(2000, ge=1)

    @property
    def problems(self) -> str:
        """What ``qs_lib.load_problems`` is to read: the local folder or file if one is given."""
        return self.data or self.source


class TokenSetup(Source, PretrainSettings):
    """01: thinking tokens and the champion."""

    champion: str = ""
    chat_template: bool = False
    prompt_examples: int = Field(0, ge=0)
    architecture: str = "llama"
    hidden_size: int = Field(128, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    intermediate_size: int = Field(384, ge=8)
    vocab_size: int = Field(2048, ge=300)
    byte_level: bool = False
    steps: int = Field(30, ge=1)  # a small run
    direct_share: float = Field(0.25, ge=0, le=1)
    hard_worked: float = Field(1.0, ge=0, le=1)
    eval_problems: int = Field(48, ge=2)


class DatasetGeneration(Source):
    """02: worked examples and problems."""

    train_problems: int = Field(4000, ge=1)
    cot_examples: int = Field(400, ge=1)
    strategy_examples: int = Field(200, ge=1)
    hard_examples: float = Field(1.0, ge=0, le=1)
    validation_problems: int = Field(480, ge=2)
    test_problems: int = Field(720, ge=2)


class Baking(NotebookParams, BakingSettings):
    """03: prompt baking."""

    epochs: int = Field(1, ge=1)  # a small run
    examples: int = Field(96, ge=1)
    trajectories: int = Field(64, ge=0)  # a small run
    prompt_examples: int = Field(0, ge=0)
    hard_shown: float = Field(1.0, ge=0, le=1)
    eval_problems: int = Field(48, ge=2)


class ParallelThoughts(NotebookParams):
    """04: many thoughts at once."""

    problem: int = Field(0, ge=0)
    num_thoughts: int = Field(4, ge=1, le=64)
    thought_length: int = Field(28, ge=2)
    temperature: float = Field(1.0, ge=0)
    problems: int = Field(24, ge=2)


class Reinforce(NotebookParams, QuietStarSettings):
    """05: REINFORCE on thoughts."""

    steps: int = Field(4, ge=1)  # a small run
    batch_size: int = Field(8, ge=1)  # a small run
    evaluate_every: int = Field(2, ge=1)  # a small run
    mixing: Literal["log_probs", "hidden"] = "log_probs"
    gate: Literal["thoughts", "place"] = "thoughts"
    eval_problems: int = Field(24, ge=2)
    test_problems: int = Field(24, ge=2)


class AntiTheater(NotebookParams):
    """06: are the thoughts for show?"""

    theater: Literal["honest", "unused", "random", "frozen", "copied", "repeated", "leaked", "seen"] = "honest"
    problems: int = Field(24, ge=2)
    num_thoughts: int = Field(4, ge=2, le=64)
    thought_length: int = Field(28, ge=3)
    temperature: float = Field(1.0, gt=0)
    probe_problems: int = Field(2000, ge=1)
    cheat_problems: int = Field(24, ge=0)
    episodes: int = Field(24, ge=1)


class Latency(NotebookParams):
    """07: what thinking costs."""

    repeats: int = Field(2, ge=1)
    target_ms: float = Field(200.0, gt=0)
    random_models: list[Literal["10M", "30M", "100M"]] = Field(["10M"], min_length=1)
    random_repeats: int = Field(1, ge=1)
    random_seconds: float = Field(0.0, ge=0)


class Scoreboard(NotebookParams):
    """08: all criteria in one table."""


class Scaling(NotebookParams):
    """09: sweeps, several processes, several machines."""

    workers: int = Field(2, ge=1)
    num_thoughts: list[int] = Field([2, 4], min_length=1)
    num_processes: int = Field(2, ge=1, le=64)
    steps: int = Field(6, ge=1)


NOTEBOOKS = {
    "01_token_setup": TokenSetup,
    "02_dataset_generation": DatasetGeneration,
    "03_baking": Baking,
    "04_parallel_thoughts": ParallelThoughts,
    "05_rl": Reinforce,
    "06_anti_theater": AntiTheater,
    "07_latency": Latency,
    "08_scoreboard": Scoreboard,
    "09_scale": Scaling,
}


def read_yaml(path: Path):
    """What a YAML file holds, plain values only. Raises ParameterError if it is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def read_variant(variant: str, root: Path = REPOSITORY) -> dict[str, dict]:
    """Return stage -> what a variant sets for it, not checked yet, for all stages that it has a file for.

    Raises ParameterError if it has none and is not "defaults", or if a file is no flat mapping.
    """
    paths = sorted((root / "params").glob("[0-9]*/*.yaml"))
    known = {path.stem for path in paths} | {"defaults"}
    if variant not in known:
        raise ParameterError(unknown_name(variant, known).replace("parameter", "variant", 1))
    given = {}
    for path in (path for path in paths if path.stem == variant):
        given[path.parent.name] = read_yaml(path) or {}
        if not isinstance(given[path.parent.name], dict):
            raise ParameterError(f"{path} must hold lines of the form 'name: value'")
    return given


def recipe(stage: str, variant: str = "pocket") -> dict:
    """All parameters of a stage's notebook under a variant, its defaults included. Raises ParameterError."""
    return check_parameters(REPOSITORY / "notebooks" / f"{stage}.ipynb", read_variant(variant).get(stage, {}))
