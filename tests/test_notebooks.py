"""What every committed notebook keeps to, so that `pytest --nbval` really compares it and papermill can run it."""

import ast
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from nbval.plugin import get_sanitize_patterns

from qs_lib.workbook.params import NOTEBOOKS, check_parameters, notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = sorted((ROOT / "params").glob("[0-9]*/*.yaml"))

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


@every_notebook
def test_parameters_cell(path):
    cells = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    if path.stem not in NOTEBOOKS and not cells:
        return  # 00_start_here takes none
    assert len(cells) == 1 and cells[0] is not None
    source = cells[0].source
    for statement in ast.parse(source).body:
        assert isinstance(statement, (ast.Assign, ast.AnnAssign)), ast.unparse(statement)
        ast.literal_eval(statement.value)
        lines = source.splitlines()[statement.lineno - 1 : statement.end_lineno]
        assert any("#" in line for line in lines), f"{lines[0]} needs a comment"


@every_notebook
def test_parameters_are_those_of_the_model(path):
    if path.stem in NOTEBOOKS:
        names = set(NOTEBOOKS[path.stem].model_fields)
        assert set(notebook_parameters(path)) == names
        assert set(papermill.inspect_notebook(str(path))) == names, "papermill reads no line whose comment holds ="
        check_parameters(path, {})


@every_notebook
def test_every_code_cell_ran_in_order(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [output for output in cell.outputs if output.output_type == "error"], cell.id


@every_notebook
def test_nothing_that_strict_comparison_cannot_repeat(path):
    for cell in code_cells(path):
        for word in ("interact(", "interactive_output(", "Output(", "clear_output", "display_id=", "NBVAL_"):
            assert word not in cell.source, f"{cell.id}: {word}"
        assert not {"nbval-skip", "raises-exception", "nbval-raises-exception"} & set(tags(cell)), cell.id


@every_notebook
def test_no_machine_in_the_file(path):
    notebook = nbformat.read(path, 4)
    assert not {"widgets", "papermill"} & set(notebook.metadata)
    for cell in notebook.cells:
        assert not {"execution", "papermill"} & set(cell.metadata), cell.id
        found = re.search(r"(?<![\w.])/(?:home|root|tmp|Users|var|work|mnt)/|\b[A-Z]:\\\\", str(cell))
        assert not found, f"{cell.id}: {found.group()}"


@every_notebook
def test_cells_are_named_and_short(path):
    cells = nbformat.read(path, 4).cells
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        assert not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", cell.id), f"{cell.id} is a default id"
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 40, cell.id
    assert path.stat().st_size < 1_000_000


@every_notebook
def test_kernel_and_prose(path):
    notebook = nbformat.read(path, 4)
    assert notebook.metadata.kernelspec.name == "python3"
    markdown = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(markdown) >= 0.6 * (len(notebook.cells) - len(markdown))
    assert markdown[0].source.startswith("# ")


def test_at_least_nine_of_ten_outputs_are_compared():
    cells = [cell for path in PATHS for cell in code_cells(path) if cell.outputs]
    compared = [cell for cell in cells if "nbval-ignore-output" not in tags(cell)]
    assert len(compared) >= 0.9 * len(cells)


@pytest.mark.parametrize("name", ["00_start_here", "04_parallel_thoughts", "06_anti_theater"])
def test_the_inspector_can_be_read_without_a_kernel(name):
    shown = [
        output.data
        for cell in code_cells(ROOT / "notebooks" / f"{name}.ipynb")
        if cell.id == "inspector"
        for output in cell.outputs
        if "data" in output
    ]
    twin = next(data["text/html"] for data in shown if "text/html" in data)
    assert "Thought 1" in twin and "mixing weight" in twin and "problems</p>" in twin


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_parameter_files_fit_their_notebook(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#"), "the first line says what question the run answers, its cost and machine"
    given = yaml.safe_load(text) or {}
    defaults = notebook_parameters(ROOT / "notebooks" / f"{path.parent.name}.ipynb")
    values = check_parameters(ROOT / "notebooks" / f"{path.parent.name}.ipynb", given)
    assert not {"run_name", "upstream"} & set(given), "the run driver sets these"
    same = [name for name in given if values[name] == defaults[name]]
    assert not same, f"{same} repeat the notebook's defaults"


def test_every_sanitize_rule_is_read():
    text = (ROOT / "tests" / "sanitize.cfg").read_text(encoding="utf-8")
    rules = get_sanitize_patterns(text)
    assert len(rules) == text.count("\n[") == text.count("\nregex:") == text.count("\nreplace:")
    for pattern, _ in rules:
        re.compile(pattern)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("<Thing at 0x7f3a2b10>", "<Thing at ADDRESS>"),
        ("saved /x/y/qs-outputs-abc_1/dev/03/run.json", "saved OUTPUTS/dev/03/run.json"),
        ("read /x/y/outputs/pocket/03", "read OUTPUTS/pocket/03"),
        ("took 12.5 s, 3 ms a step", "took TIME, TIME a step"),
        ("5 steps, 60 km, loss 0.123", "5 steps, 60 km, loss 0.123"),
        ("12.5 tokens/s", "RATE"),
    ],
)
def test_sanitize_rules_clean_what_they_name(text, cleaned):
    for pattern, replacement in get_sanitize_patterns((ROOT / "tests" / "sanitize.cfg").read_text(encoding="utf-8")):
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    assert text == cleaned


def test_there_is_one_list_of_dependencies():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"][-1] == {"pip": ["-c constraints.txt", "-e .[notebooks,dev]"]}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)


def test_the_same_environment_makes_and_compares_outputs():
    conftest = (ROOT / "conftest.py").read_text()
    small = re.search(r"^SMALL = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    for setting in small.split():
        name, value = setting.split("=")
        assert f'"{name}": "{value}"' in conftest
