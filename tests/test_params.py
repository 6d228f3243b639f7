import inspect
import json
from pathlib import Path

import nbformat
import pytest
import yaml
from pydantic import Field

import qs_lib as qs
from qs_lib.errors import ParameterError, WorkbookError
from qs_lib.files import REPOSITORY
from qs_lib.training.settings import BakingSettings, PretrainSettings, QuietStarSettings
from qs_lib.workbook.params import NOTEBOOKS, NotebookParams, check_parameters, notebook_parameters, read_variant

BOOK = REPOSITORY / "notebooks" / "05_rl.ipynb"
TRAININGS = [("01_token_setup", PretrainSettings), ("03_baking", BakingSettings), ("05_rl", QuietStarSettings)]


class Toy(NotebookParams):
    num_thoughts: int = Field(default=4, ge=1, le=64)
    learning_rate: float = Field(default=1e-3, gt=0)
    objective: str = "difference"


def namespace(injected: str = "", **values) -> dict:
    """A notebook's globals after papermill injected a cell."""
    cells = ["", "seed = 0", f"# Parameters\n{injected}"] if injected else ["", "seed = 0"]
    return {"In": cells, "run_name": "dev", **values}


def write_notebook(path: Path, parameters: str) -> Path:
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)
    return path


def test_reads_defaults_and_injected_values():
    params = Toy.from_notebook(namespace("num_thoughts = 8\n", num_thoughts=8, seed=3, unrelated="x"))
    assert (params.num_thoughts, params.seed, params.upstream, params.run_name) == (8, 3, "", "dev")


def test_yaml_text_becomes_a_number():
    assert Toy.from_notebook(namespace(learning_rate="1e-4")).learning_rate == 1e-4


def test_other_variables_of_a_session_are_not_parameters():
    assert Toy.from_notebook(namespace(num_thougts=8, stage=object())).num_thoughts == 4


def test_params_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Toy(run_name="a").seed = 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_thougts": 8}, ["unknown parameter 'num_thougts'", "did you mean num_thoughts?"]),
        ({"lerning_rate": 0.1}, ["did you mean learning_rate?"]),
        ({"zzz": 1}, ["unknown parameter 'zzz'", "known are", "num_thoughts"]),
        ({"num_thoughts": 0}, ["num_thoughts=0", "greater than or equal to 1"]),
        ({"num_thoughts": "many"}, ["num_thoughts='many'", "integer"]),
        ({"num_thoughts": 2.5}, ["num_thoughts=2.5", "integer"]),
        ({"learning_rate": float("nan")}, ["learning_rate=nan", "finite"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"run_name": "../up"}, ["run_name='../up'", "letters, digits"]),
        ({"run_name": ""}, ["run_name=''"]),
        ({"run_name": "x" * 65}, ["run_name='xxx", "..."]),
        ({"run_name": "a\n"}, ["run_name="]),
        ({"objective": 5}, ["objective=5", "string"]),
        ({"seed": -1, "num_thoughts": 0}, ["seed=-1", "num_thoughts=0"]),
    ],
)
def test_a_bad_parameter_is_one_sentence(values, words):
    injected = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    with pytest.raises(ParameterError) as caught:
        Toy.from_notebook(namespace(injected, **values))
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_a_missing_parameter_is_named():
    with pytest.raises(ParameterError, match="run_name is missing"):
        Toy.from_notebook({"In": []})


def test_notebooks_show_the_sentence_only(monkeypatch):
    monkeypatch.delenv("QS_DEBUG", raising=False)
    assert WorkbookError("why")._render_traceback_() == ["WorkbookError: why"]
    monkeypatch.setenv("QS_DEBUG", "1")
    try:
        raise ParameterError("why")
    except ParameterError as error:
        assert "Traceback" in "".join(error._render_traceback_())


CELL = """seed: int = 0  # s
run_name: str = "dev"  # r
upstream: str = ""  # u; "" = the committed run
num_thoughts: int = 4  # n
rates: list = [
    1e-3,
    -2.5,
]  # l
"""


def test_notebook_parameters_are_read_as_values(tmp_path):
    found = notebook_parameters(write_notebook(tmp_path / "x.ipynb", CELL))
    assert found == {"seed": 0, "run_name": "dev", "upstream": "", "num_thoughts": 4, "rates": [1e-3, -2.5]}


def test_notebook_parameters_must_be_literals(tmp_path):
    with pytest.raises(ParameterError, match="literals only"):
        notebook_parameters(write_notebook(tmp_path / "x.ipynb", "seed = int(3)"))
    with pytest.raises(ParameterError, match="literals only"):
        notebook_parameters(write_notebook(tmp_path / "x.ipynb", "import os"))
    with pytest.raises(ParameterError, match="there is no notebook"):
        notebook_parameters(tmp_path / "y.ipynb")


def test_check_parameters_of_an_unknown_notebook_checks_names(tmp_path):
    notebook = write_notebook(tmp_path / "x.ipynb", CELL)
    assert check_parameters(notebook, {"num_thoughts": 8})["num_thoughts"] == 8
    with pytest.raises(ParameterError, match="did you mean num_thoughts"):
        check_parameters(notebook, {"num_thougts": 8})
    with pytest.raises(ParameterError, match="plain numbers"):
        check_parameters(notebook, {"num_thoughts": {1, 2}})
    with pytest.raises(ParameterError, match="plain numbers"):
        check_parameters(notebook, {"num_thoughts": float("nan")})


def test_check_parameters_of_a_workbook_notebook_checks_values(tmp_path):
    common = "".join(CELL.splitlines(keepends=True)[:3])
    notebook = write_notebook(tmp_path / "09_toy.ipynb", common + "learning_rate: float = 1e-3  # l\n")
    NOTEBOOKS["09_toy"] = Toy
    try:
        values = check_parameters(notebook, {"learning_rate": "1e-4"})
        assert values["learning_rate"] == 1e-4
        assert json.loads(json.dumps(values)) == values
        with pytest.raises(ParameterError, match="learning_rate=-1"):
            check_parameters(notebook, {"learning_rate": -1})
    finally:
        del NOTEBOOKS["09_toy"]


@pytest.mark.parametrize(
    "name",
    [
        "x=0;open('canary','w');y",
        "seed\nimport os",
        "__class__",
        "Seed",
        "se ed",
        "1seed",
        "s" * 41,
        5,
        "run_name;x",
    ],
)
def test_code_in_a_parameter_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    notebook = write_notebook(tmp_path / "x.ipynb", CELL)
    with pytest.raises(ParameterError, match="unknown parameter"):
        check_parameters(notebook, {name: 1})
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_a_notebook_shows_the_defaults_and_the_comments_of_its_settings(stage):
    """A parameter has one home: the literals of the parameters cell are compared with it, word for word in its comment."""
    fields, notebook = NOTEBOOKS[stage].model_fields, REPOSITORY / "notebooks" / f"{stage}.ipynb"
    shown = notebook_parameters(notebook)
    assert shown.keys() == fields.keys()
    assert {name: fields[name].default for name in shown if name != "run_name"} == {
        name: value for name, value in shown.items() if name != "run_name"
    }


@pytest.mark.parametrize(("stage", "settings"), TRAININGS)
def test_only_the_sizes_of_a_small_run_differ_from_the_documented_training(stage, settings):
    small = {"steps", "batch_size", "evaluate_every", "epochs", "trajectories"}
    differ = {n for n, f in settings.model_fields.items() if NOTEBOOKS[stage].model_fields[n].default != f.default}
    assert differ <= small


@pytest.mark.parametrize(("stage", "settings"), TRAININGS)
def test_every_setting_has_one_line_that_says_what_it_is(stage, settings):
    source = inspect.getsource(settings).splitlines()
    for name in settings.model_fields:
        (line,) = [line for line in source if line.startswith(f"    {name}: ")]
        assert "  # " in line, name


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "params").glob("[0-9]*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_a_variant_sets_known_parameters_to_other_values_than_the_defaults(path):
    notebook = REPOSITORY / "notebooks" / f"{path.parent.name}.ipynb"
    given, shown = read_variant(path.stem)[path.parent.name], notebook_parameters(notebook)
    values = check_parameters(notebook, given)
    assert given and all(values[name] != shown[name] for name in given)


def test_the_trainings_of_python_are_those_of_the_notebooks():
    """``qs.train_quiet_star(...)`` and ``qs.bake(...)`` take their defaults from the same classes."""
    assert QuietStarSettings().objective == "positive" == NOTEBOOKS["05_rl"].model_fields["objective"].default
    for training in (qs.train_quiet_star, qs.bake):
        own = {"settings", "checkpoint", "optimizer", "on_epoch", "prompts", "running", "changed"}
        optional = {n for n, p in inspect.signature(training).parameters.items() if p.default is not p.empty}
        assert optional <= own and len(inspect.signature(training).parameters) <= 11


@pytest.mark.parametrize(
    ("name", "words", "kind"),
    [
        ("run_name", ["20251125", "1e5", "007", "1_000", "nan"], "number"),
        ("run_name", ["True", "False"], "bool"),
        ("run_name", ["None"], "NoneType"),
        ("upstream", ["20251125", "0x10", "-1"], "number"),
        ("upstream", ["None"], "NoneType"),
    ],
)
def test_a_name_that_papermill_reads_as_something_else_says_how_to_keep_it(name, words, kind):
    from papermill.cli import _resolve_type

    for word in words:
        if isinstance(value := _resolve_type(word), str):
            assert word == "0x10" and check_parameters(BOOK, {name: value})[name] == word
            continue
        with pytest.raises(
            ParameterError, match=f"parameter {name}=.* was read as a {kind}, not as a string"
        ) as caught:
            check_parameters(BOOK, {name: value})
        assert "put it in quotes, or give papermill -r in place of -p" in str(caught.value)
        assert check_parameters(BOOK, {name: word})[name] == word  # what -r hands over


@pytest.mark.parametrize(("text", "kind"), [("20251125", "number"), ("2025-11-25", "date"), ("yes", "bool")])
def test_a_name_that_yaml_reads_as_something_else_says_the_same(text, kind):
    with pytest.raises(ParameterError, match=f"was read as a {kind}, not as a string: put it in quotes"):
        Toy(run_name=yaml.safe_load(text))
    assert Toy(run_name=yaml.safe_load(f"'{text}'")).run_name == text


@pytest.mark.parametrize("settings", [PretrainSettings, BakingSettings, QuietStarSettings])
def test_settings_of_another_training_are_refused(settings):
    for other in ({"steps": 1}, 3, Toy(run_name="a"), *(o() for _, o in TRAININGS if o is not settings)):
        with pytest.raises(ParameterError, match=f"settings are a {type(other).__name__}; they must be a"):
            settings.of(other)
    assert settings.of(None, seed=3) == settings(seed=3) == settings.of(settings(seed=1), seed=3)
    with pytest.raises(ParameterError, match="both 0: nothing would be trained"):
        settings(muon_lr=0, adamw_lr=0)
    assert settings(muon_lr=0).adamw_lr > 0
