"""Run folders and the driver, on two toy notebooks or, where no kernel is needed, on stages started here."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qs_lib.errors import ParameterError, StageError, UpstreamError
from qs_lib.files import PACKAGE, find_run, outputs_root, run_folder, write_bytes, write_error
from qs_lib.training.checkpoint import Checkpoint
from qs_lib.workbook import run
from qs_lib.workbook import stage as stage_module
from qs_lib.workbook.execute import Terminal, _failure
from qs_lib.workbook.params import NotebookParams
from qs_lib.workbook.run import main, print_scoreboard, run_options, run_stages, stage_notebooks
from qs_lib.workbook.stage import code_hash, read_stage, stage_finished, start_stage


class Toy(NotebookParams):
    steps: int = 3


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("QS_NOTEBOOK_SHA256", raising=False)
    monkeypatch.delenv("QS_COMMAND", raising=False)
    monkeypatch.delenv("TQDM_DISABLE")
    return tmp_path / "outputs"


def finish_first(run_name="a", steps=3):
    stage = start_stage(Toy(run_name=run_name, upstream=run_name, steps=steps), "01_first")
    stage.log(step=0, loss=torch.tensor(0.5), norm=numpy.float32(2))
    stage.write_json("deep/numbers.json", {"steps": steps})
    stage.finish({"steps": steps})
    return stage


def finish_second(run_name="a"):
    stage = start_stage(Toy(run_name=run_name, upstream=run_name), "02_second", needs=("01_first",))
    stage.write_jsonl("rows.jsonl", [{"text": "\ud800"}, {"text": "ä"}])
    stage.finish({})
    return stage


def test_a_stage_leaves_a_record_written_last(outputs):
    first = finish_first()
    record = json.loads((outputs / "a/01_first/run.json").read_text())
    assert set(record["outputs"]) == {"metrics.jsonl", "deep/numbers.json"}
    assert record["parameters"] == {"seed": 0, "run_name": "a", "upstream": "a", "steps": 3}
    assert record["seed"] == 0 and record["format_version"] == 1 and record["device"] in ("cpu", "cuda")
    assert record["versions"]["torch"] and record["wall_s"] >= 0 and "papermill notebooks/01_first" in record["command"]
    assert json.loads((first.folder / "metrics.jsonl").read_text()) == {"step": 0, "loss": 0.5, "norm": 2.0}
    newest = max(first.folder.rglob("*"), key=lambda path: (path.is_file(), path.stat().st_mtime_ns))
    assert newest.name == "run.json"
    assert not list(outputs.rglob("*.tmp"))


def test_a_stage_reads_an_earlier_one_and_records_it(outputs):
    finish_first()
    second = finish_second()
    record, reason = read_stage(second.folder)
    assert reason == "" and list(record["upstream"]["stages"]) == ["01_first"] and record["upstream"]["run"] == "a"
    assert second.need("01_first") == outputs / "a/01_first"


def parameters(run_name="a", **changes):
    return Toy(run_name=run_name, upstream=run_name).model_dump() | changes


def test_a_stage_of_edited_data_is_not_finished(outputs, tmp_path):
    class Read(NotebookParams):
        data: str = ""

    file = tmp_path / "my data" / "train.jsonl"
    file.parent.mkdir()
    for named in (file, file.parent):
        file.write_text("one")
        stage = start_stage(Read(run_name="a", upstream="a", data=str(named)), "01_first")
        stage.finish({})
        given, before = stage.params.model_dump(), stage.identity()
        assert stage_finished(stage.folder, given, None) == (True, "finished")
        file.write_text("two")
        assert stage_finished(stage.folder, given, None) == (False, "the files of data changed")
        assert stage.identity() != before, "an interrupted training would go on with other data"
    record = stage.folder / "run.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "data_sha256"}))
    assert stage_finished(stage.folder, given, None)[0], "a record of before knows nothing of it"


def test_only_a_stage_that_still_holds_is_finished(outputs, monkeypatch):
    folder = outputs / "a/01_first"
    assert stage_finished(folder, parameters(), None) == (False, "not run yet")
    finish_first()
    assert stage_finished(folder, parameters(), None) == (True, "finished")
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert stage_finished(folder, parameters(), None)[0], "a new time alone is no reason"
    assert stage_finished(folder, parameters(steps=4), None) == (False, "parameter steps changed (3 -> 4)")
    assert stage_finished(folder, parameters(new=1), None) == (False, "parameter new changed (None -> 1)")
    assert stage_finished(folder, parameters(), "other") == (False, "the notebook changed")

    monkeypatch.setattr(stage_module, "code_hash", lambda: "other")
    assert stage_finished(folder, parameters(), None) == (False, stage_module.CODE_CHANGED)
    assert stage_finished(folder, parameters(), None, check_code=False)[0]
    monkeypatch.undo()
    monkeypatch.setenv("QS_OUTPUTS", str(outputs))

    numbers = folder / "deep/numbers.json"
    whole = numbers.read_bytes()
    numbers.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "numbers.json has changed" in stage_finished(folder, parameters(), None)[1]
    numbers.unlink()
    assert "numbers.json is missing" in stage_finished(folder, parameters(), None)[1]
    numbers.write_bytes(whole)
    assert stage_finished(folder, parameters(), None)[0]

    record = json.loads((folder / "run.json").read_text())
    for text, words in [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps(record | {"format_version": 2}), "format 2"),
    ]:
        (folder / "run.json").write_text(text)
        assert words in stage_finished(folder, parameters(), None)[1]
    (folder / "run.json").unlink()
    assert stage_finished(folder, parameters(), None) == (False, "not finished")


SCIENCE = ["errors.py", "stats.py", "files.py", "settings.py", "model.py", "champion.py", "data/problems.py"]
SCIENCE += ["thoughts/generate.py", "evaluation/accuracy.py", "training/optim.py", "data/__init__.py"]
OTHERS = ["workbook/figures.py", "workbook/tables.py", "workbook/run.py", "workbook/params.py", "viewing/inspector.py"]
OTHERS += ["viewing/html.py", "experiments/arms.py", "__init__.py"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the library that a test may change; the hash is taken of it."""
    copy = tmp_path / "qs_lib"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stage_module, "PACKAGE", copy)
    return copy


def steps_kept(stage):
    """How far a training in the stage's folder is resumed now, after one that saved its step 3."""
    with Checkpoint(stage.folder / stage_module.CHECKPOINTS, stage.identity()) as checkpoint:
        return checkpoint.resume({"losses": []})


def saved_after_three_steps(stage):
    with Checkpoint(stage.folder / stage_module.CHECKPOINTS, stage.identity()) as checkpoint:
        checkpoint.resume({"losses": []})
        checkpoint.after(3, {"losses": [0.5]}, last=True)


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_number_depends_on_repeats_nothing(package, outputs, name):
    finish_first()
    second = start_stage(Toy(run_name="a"), "02_second")
    saved_after_three_steps(second)
    path = package / name
    path.write_text(path.read_text(encoding="utf-8") + "\nBLUE = 'another blue'\n", encoding="utf-8")
    (package / "viewing" / "new.py").write_text("")
    assert stage_finished(outputs / "a/01_first", parameters(), None) == (True, "finished")
    assert steps_kept(second) == 3


@pytest.mark.parametrize(
    "name", [*SCIENCE, "thoughts/new.py", "evaluation/deeper/new.py", "thoughts/checks.py -> gone"]
)
def test_what_numbers_depend_on_repeats_the_stage_and_starts_its_training_anew(package, outputs, name):
    finish_first()
    second = start_stage(Toy(run_name="a"), "02_second")
    saved_after_three_steps(second)
    path = package / name.removesuffix(" -> gone")
    if name.endswith(" -> gone"):
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.read_text(encoding="utf-8") + "\n" if path.exists() else "", encoding="utf-8")
    assert stage_finished(outputs / "a/01_first", parameters(), None) == (False, stage_module.CODE_CHANGED)
    assert stage_finished(outputs / "a/01_first", parameters(), None, check_code=False)[0]
    assert steps_kept(second) == 0


def test_the_hash_does_not_ask_in_what_order_files_are_listed(package, monkeypatch):
    def listed_backwards(folder, pattern):
        return sorted(rglob(folder, pattern), reverse=True)

    before, rglob = code_hash(), type(package).rglob
    monkeypatch.setattr(type(package), "rglob", listed_backwards)
    assert code_hash() == before
    (package / "model.py").rename(package / "model_of_old.py")
    assert code_hash() != before


def test_every_wing_is_in_the_hash_or_left_out_on_purpose():
    wings = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert wings - stage_module.SCIENCE == {"__init__", "viewing", "workbook", "experiments"}
    assert stage_module.SCIENCE <= wings


def test_a_notebooks_text_and_outputs_may_change_without_a_rerun(tmp_path):
    write_notebook(tmp_path, "01_first", FIRST)
    path = tmp_path / "01_first.ipynb"
    before, notebook = stage_module.notebook_hash(path), nbformat.read(path, 4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="another output")]
    notebook.cells[2].execution_count = 7
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("another text"))
    nbformat.write(notebook, path)
    assert stage_module.notebook_hash(path) == before
    notebook.cells[3].source += "\n# another line"
    nbformat.write(notebook, path)
    assert stage_module.notebook_hash(path) != before


def test_a_changed_upstream_unfinishes_what_depends_on_it(outputs):
    finish_first()
    finish_second()
    folder, run = outputs / "a/02_second", outputs / "a"
    assert stage_finished(folder, parameters(), None, run)[0]
    finish_first()
    assert stage_finished(folder, parameters(), None, run)[0], "the same bytes again are no reason"
    finish_first(steps=5)
    assert stage_finished(folder, parameters(), None, run) == (False, "01_first changed")
    (run / "01_first/run.json").unlink()
    assert stage_finished(folder, parameters(), None, run) == (False, "01_first: not finished")
    assert stage_finished(folder, parameters(), None) == (False, "01_first: not found")


def test_starting_again_clears_the_old_attempt(outputs):
    folder = finish_first().folder
    for name in (".metrics.jsonl.tmp", ".checkpoint", "01_first.ipynb"):
        (folder / name).write_text("x")
    stage = start_stage(Toy(run_name="a"), "01_first")
    assert sorted(path.name for path in folder.iterdir()) == [".checkpoint", "01_first.ipynb"]
    assert read_stage(folder) == (None, "not finished")
    stage.finish({})
    assert read_stage(folder)[0]["outputs"] == {}


def test_a_missing_upstream_names_the_command_and_touches_nothing(outputs, monkeypatch):
    with pytest.raises(UpstreamError, match=r"there is no run 'b'.*`make run RUN=b`"):
        start_stage(Toy(run_name="a", upstream="b"), "02_second", needs=("01_first",))
    assert not (outputs / "a").exists()
    start_stage(Toy(run_name="b"), "01_first")
    with pytest.raises(
        UpstreamError,
        match=r"02_second needs 01_first of the run b \(not finished\).*papermill notebooks/01_first.ipynb",
    ):
        start_stage(Toy(run_name="a", upstream="b"), "02_second", needs=("01_first",))
    monkeypatch.setattr(stage_module, "REPOSITORY", outputs)
    with pytest.raises(UpstreamError, match=r"run pocket \(not run yet\).*`make refresh`"):
        start_stage(Toy(run_name="a"), "02_second", needs=("01_first",))


def test_upstream_may_be_committed_a_name_or_a_path(outputs, tmp_path):
    finish_first()
    assert find_run("") == stage_module.REPOSITORY / "outputs" / "pocket"
    assert find_run("a") == find_run(str(outputs / "a")) == outputs / "a"
    assert find_run("tests") == stage_module.REPOSITORY / "tests", "paths start at the repository"
    with pytest.raises(UpstreamError):
        find_run("no/where")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../..", "{x}/y", "", ".hidden", "a\\b"])
def test_runs_stay_inside_outputs(name, outputs):
    with pytest.raises(StageError):
        run_folder(name)


def test_a_link_out_of_outputs_is_refused(outputs, tmp_path):
    outputs.mkdir()
    (outputs / "out").symlink_to(tmp_path)
    with pytest.raises(StageError, match="link"):
        run_folder("out")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_files_stay_inside_the_stage(name):
    stage = start_stage(Toy(run_name="a"), "01_first")
    with pytest.raises(StageError, match="not inside"):
        stage.write_json(name, {})


def test_only_finite_plain_values_are_recorded():
    stage = start_stage(Toy(run_name="a"), "01_first")
    for value in (float("nan"), float("inf"), torch.tensor(float("nan"))):
        with pytest.raises(StageError, match="NaN or infinity"):
            stage.log(loss=value)
    for value in (object(), torch.zeros(2), numpy.zeros(2)):
        with pytest.raises(StageError, match="only plain values"):
            stage.write_json("x.json", value)
    assert not (stage.folder / "metrics.jsonl").exists()


def test_models_are_saved_whole_and_published(outputs, monkeypatch):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    stage = start_stage(Toy(run_name="a"), "01_first")
    stage.save_model("model", model)
    folder = stage.save_model("model", model)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors"]
    assert stage.publish("model") == outputs / "a/model"
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(*arguments, **options):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(StageError, match="no space left"):
        stage.save_model("model", model)
    monkeypatch.setattr(model, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.save_model("model", model)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(stage.folder.rglob(".*"))
    with pytest.raises(StageError, match="cannot be written"):
        stage.publish("absent.json")


FORK = multiprocessing.get_context("fork")  # a fresh Python would import torch again


def fill_disk(path, answer):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_bytes(path, b"x" * 5000)
    except StageError as error:
        answer.send(str(error))


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    answer, child_end = FORK.Pipe()
    child = FORK.Process(target=fill_disk, args=(path, child_end))
    child.start()
    child.join()
    assert answer.recv().startswith("no space left to write")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("QS_OUTPUTS", str(blocked))
    with pytest.raises(StageError, match="cannot be written"):
        start_stage(Toy(run_name="a"), "01_first")
    denied = write_error(PermissionError(13, "Permission denied"), blocked)
    assert "QS_OUTPUTS" in str(denied)


def hold(answer):
    stage = start_stage(Toy(run_name="a"), "01_first")
    answer.send(repr(stage))
    time.sleep(60)


def test_a_run_has_one_writer(outputs):
    answer, child_end = FORK.Pipe()
    holder = FORK.Process(target=hold, args=(child_end,))
    holder.start()
    assert answer.recv() == "Stage(01_first of run a)"
    with pytest.raises(StageError, match=rf"run a is in use by process {holder.pid} .*stage 01_first"):
        start_stage(Toy(run_name="a"), "02_second")
    holder.kill()
    holder.join()
    start_stage(Toy(run_name="a"), "02_second").finish({})


def test_the_chain_is_01_to_08_though_there_are_notebooks_beside_it():
    chain = [path.name[:3] for path in stage_notebooks(stage_module.REPOSITORY / "notebooks")]
    assert chain == [f"0{number}_" for number in range(1, 9)] and list(
        (stage_module.REPOSITORY / "notebooks").glob("09_*.ipynb")
    )


def test_the_same_process_may_start_its_stage_again():
    start_stage(Toy(run_name="a"), "01_first")
    finish_first()


PARAMETERS = """seed: int = 0  # s
run_name: str = "dev"  # r
upstream: str = ""  # u
data: str = ""  # d
steps: int = 3  # n
"""
# the kernel takes the modules it needs without the package's own imports, which would cost it seconds
ALONE = f"""import sys, types
sys.modules["qs_lib"] = types.ModuleType("qs_lib")
sys.modules["qs_lib"].__path__ = [{str(PACKAGE)!r}]
"""
CHECK = f"""{ALONE}from tqdm.auto import tqdm
from qs_lib.workbook.params import NotebookParams
from qs_lib.workbook.stage import start_stage
class Toy(NotebookParams):
    data: str = ""
    steps: int = 3
P = Toy.from_notebook(globals())"""
FIRST = """import time
stage = start_stage(P, "01_first")
for step in tqdm(range(P.steps), desc="toy bar"):
    stage.log(step=step)
    time.sleep(0.02)
stage.finish({"steps": P.steps, "share": 0.12345})"""
SECOND = """stage = start_stage(P, "02_second", needs=("01_first",))
lines = (stage.need("01_first") / "metrics.jsonl").read_text().splitlines()
stage.write_json("lines.json", len(lines))
stage.finish({"lines": len(lines)})"""


def write_notebook(folder, name, body):
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, CHECK, body)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "a {b}" / "notebooks"  # papermill formats paths: braces must survive
    (folder.parent / "params" / "01_first").mkdir(parents=True)
    folder.mkdir()
    (folder.parent / "params" / "01_first" / "small.yaml").write_text("# short\nsteps: 5\n")
    write_notebook(folder, "00_start_here", "1 / 0")
    write_notebook(folder, "01_first", FIRST)
    write_notebook(folder, "02_second", SECOND)
    return folder


def test_the_chain_runs_once_and_again_only_where_it_must(notebooks, outputs, capfd):
    options = [
        "--variant",
        "small",
        "--keep",
        "--notebooks",
        str(notebooks),
        "--data",
        os.path.relpath(notebooks),
    ]
    assert main(options) == 0
    out, err = capfd.readouterr()
    run = outputs / "small-run"
    assert "01_first: running, not run yet" in out and "01_first: done in" in out and "steps 5, share 0.123" in out
    assert "toy bar: 100%" in err
    record = json.loads((run / "01_first/run.json").read_text())
    assert record["parameters"]["steps"] == 5 and os.path.isabs(record["parameters"]["data"])
    assert record["command"].startswith("python -m qs_lib.workbook.run --variant small")
    assert json.loads((run / "02_second/lines.json").read_text()) == 5
    assert nbformat.read(run / "01_first/01_first.ipynb", 4).cells[1].metadata.tags == ["injected-parameters"]
    assert not [path for path in run.rglob(".*") if "lock" not in path.name]

    board = run / "08_scoreboard" / "scoreboard.json"
    board.parent.mkdir()
    board.write_text("[]")
    assert main(options) == 0
    out, _ = capfd.readouterr()
    assert out.count("finished, kept") == 2 and "reached: 0 of 0" in out
    assert main([*options, "--only", "01"]) == 0
    assert "reached" not in capfd.readouterr().out, "a scoreboard of before says nothing of what was run"

    write_notebook(notebooks, "02_second", SECOND + "\n1 / 0")
    assert main([*options, "--only", "02"]) == 1
    out, err = capfd.readouterr()
    assert "02_second: running, the notebook changed" in out and "01_first" not in out
    assert "error: 02_second: ZeroDivisionError: division by zero" in err and "02_second.ipynb" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("busy", "given", "spins"), [(10, "1000", 6000), (50, "1000", 1000), (10, "77", 77)])
def test_threads_of_a_stage_spin_longer_on_idle_cores(notebooks, outputs, monkeypatch, busy, given, spins):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy)
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    monkeypatch.setenv("GOMP_SPINCOUNT", given)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # with one thread nobody waits, and nothing is measured
    body = 'import os\nstart_stage(P, "01_first").finish({"spins": int(os.environ["GOMP_SPINCOUNT"])})'
    write_notebook(notebooks, "01_first", body)
    assert main(["--notebooks", str(notebooks), "--variant", "small", "--only", "01"]) == 0
    assert read_stage(outputs / "small-run" / "01_first")[0]["summary"]["spins"] == spins


def test_parameters_given_by_word_go_where_they_are_known(notebooks):
    write_notebook(notebooks, "02_second", SECOND)
    both = run.stage_notebooks(notebooks)
    first, second = both
    assert run.overrides(both, ["steps=4"]) == {first: {"steps": 4}, second: {"steps": 4}}
    assert run.overrides(both, ["02.steps=5", "steps=4"]) == {first: {"steps": 4}, second: {"steps": 5}}
    text = second.read_text().replace("steps: int", "paces: int")
    second.write_text(text)
    assert run.overrides(both, ["steps=4", "paces=true", "data=1e-4"]) == {
        first: {"steps": 4, "data": "1e-4"},
        second: {"paces": True, "data": "1e-4"},
    }
    assert run.overrides(both, []) == {first: {}, second: {}}


def test_parameters_given_by_word_win_over_the_variant(notebooks, outputs, monkeypatch):
    seen = {}
    monkeypatch.setattr(run, "run_stage", lambda path, folder, given, *_: seen.update({path.stem: given["steps"]}))
    assert (
        main(["--variant", "small", "--notebooks", str(notebooks), "--set", "02_second.steps=7", "--set", "seed=3"])
        == 0
    )
    assert seen == {"01_first": 5, "02_second": 7}


def test_a_value_of_the_wrong_kind_is_one_sentence(capsys, outputs):
    assert main(["--variant", "pocket", "--set", "05_rl.steps=many", "--only", "05_rl"]) == 1
    assert "error: parameter steps='many': input should be a valid integer" in capsys.readouterr().err
    assert not outputs.exists()


def options_for(notebooks, *more):
    return run_options(["--variant", "small", "--run", "k", "--notebooks", str(notebooks), *more])


def test_a_killed_kernel_leaves_the_stage_unfinished(notebooks, outputs):
    write_notebook(
        notebooks,
        "01_first",
        FIRST.replace("stage.finish", "import os; os.kill(os.getpid(), 9)\nstage.finish"),
    )
    with pytest.raises(StageError, match="01_first: the kernel died"):
        run_stages(options_for(notebooks))
    assert read_stage(outputs / "k/01_first") == (None, "not finished")
    assert not (outputs / "k/02_second").exists()


def test_papermill_alone_shows_the_sentence(notebooks, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        notebooks / "01_first.ipynb",
        "out.ipynb",
        "-p",
        "stepz",
        "8",
    ]
    command[3] = str(command[3]).replace("{", "{{").replace("}", "}}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == "ParameterError: unknown parameter 'stepz'; did you mean steps?"


def test_a_stopped_run_says_how_to_continue(notebooks, outputs):
    (notebooks.parent / "params/01_first/small.yaml").write_text("steps: 5000\n")
    command = [sys.executable, "-m", "qs_lib.workbook.run", "--variant", "small", "--notebooks", str(notebooks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        metrics = outputs / "small-run/01_first/metrics.jsonl"
        end = time.monotonic() + 300
        while not metrics.exists() and time.monotonic() < end:
            time.sleep(0.1)
        driver.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        _, err = driver.communicate(timeout=60)
    assert driver.returncode == 143 and time.monotonic() - signalled < 20
    assert err.strip().splitlines()[-1] == "stopped; the same command continues with the unfinished stage"
    assert read_stage(outputs / "small-run/01_first") == (None, "not finished")
    saved = nbformat.read(outputs / "small-run/01_first/01_first.ipynb", 4)
    assert "KeyboardInterrupt" in str(saved.cells[-1].outputs), "the cell was asked to stop, not killed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variant", "smal"], "unknown variant 'smal'; did you mean small?"),
        (["--run", "../x"], "'../x' cannot name a run"),
        (["--run", "a/b"], "cannot name"),
        (["--only", "01_frist"], "unknown stage '01_frist'; did you mean 01_first?"),
        (["--notebooks", "/nowhere"], "there are no notebooks"),
        (["--data", "/nowhere/gsm8k"], "there is no file or folder /nowhere/gsm8k"),
        (["--set", "stepz=4"], "unknown parameter 'stepz'; did you mean steps?"),
        (["--set", "steps=4", "02_second.stepz=4"], "unknown parameter 'stepz'; did you mean steps?"),
        (["--set", "02_secund.steps=4"], "unknown stage '02_secund'; did you mean 02_second?"),
        (["--only", "01", "--set", "02_second.steps=4"], "unknown stage '02_second'; known are 01_first"),
        (["--set", "run_name=mine"], "unknown parameter 'run_name'"),
        (["--set", "steps"], "'steps' is not of the form name=value"),
        (["--set", "steps="], "'steps=' is not of the form name=value"),
        (["--set", "steps=[1"], "'steps=[1' is not of the form name=value"),
        (["--set", "steps=2026-01-01"], "plain numbers"),
    ],
)
def test_bad_options_are_one_sentence(notebooks, outputs, capsys, options, words):
    assert main(["--variant", "small", "--notebooks", str(notebooks), *options]) == 1
    _, err = capsys.readouterr()
    assert words in err and len(err.strip().splitlines()) == 1
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 5", "did you mean steps?"),
        ("[1, 2]", "name: value"),
        ("a: b: c", "is not YAML"),
        ("x: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("steps: [.nan]", "plain numbers"),
        ("steps: 2026-01-01", "plain numbers"),
    ],
)
def test_bad_parameter_files_are_one_sentence(notebooks, outputs, text, words):
    (notebooks.parent / "params/01_first/small.yaml").write_text(text)
    with pytest.raises(ParameterError, match=words.replace("?", r"\?")):
        run_stages(options_for(notebooks, "--seed", "1"))
    assert not outputs.exists()


def test_debug_shows_the_traceback(notebooks, capsys, monkeypatch):
    monkeypatch.setenv("QS_DEBUG", "0")  # put back afterwards what --debug sets
    assert main(["--variant", "nope", "--notebooks", str(notebooks), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_scoreboard_table(tmp_path, capsys):
    rows = [
        {
            "id": "gain",
            "criterion": "gain",
            "target": ">= 0.05",
            "value": 0.0712,
            "low": 0.01,
            "high": 0.13,
            "unit": "",
            "reached": True,
        },
        {
            "id": "ms",
            "criterion": "latency",
            "target": "< 200",
            "value": 250,
            "low": None,
            "high": None,
            "unit": "ms",
            "reached": None,
        },
        {"id": "jump", "criterion": "jumpstart", "target": ">= 0.3", "value": None, "reached": False},
    ]
    path = tmp_path / "scoreboard.json"
    path.write_text(json.dumps(rows))
    print_scoreboard(path)
    out = capsys.readouterr().out
    assert "0.0712 [0.01, 0.13]" in out and "250 ms" in out and "not measured" in out and "reported" in out
    assert "reached: 1 of 3" in out
    path.write_text("{}x")
    with pytest.raises(StageError, match="not a scoreboard"):
        print_scoreboard(path)


def test_bars_are_redrawn_on_a_terminal_and_kept_short_in_a_file(capsys):
    bars = Terminal(sys.stderr)
    bars.write("\r 10%")
    bars.write("\r100%\nnext\n")
    bars.flush()
    assert capsys.readouterr().err == "100%\nnext\n"
    bars.live = True
    bars.write("\r 10%")
    assert capsys.readouterr().err == "\r\x1b[K 10%"


def test_outputs_are_found_without_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("QS_OUTPUTS")
    monkeypatch.chdir(tmp_path)
    assert outputs_root() == stage_module.REPOSITORY / "outputs"
    monkeypatch.setenv("QS_OUTPUTS", "mine/runs")  # the driver and a notebook's kernel work in different folders
    assert outputs_root() == stage_module.REPOSITORY / "mine" / "runs"
    assert len(code_hash()) == 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MemoryError", ""),
        ("OutOfMemoryError", "CUDA out of memory"),
        ("RuntimeError", "[x] DefaultCPUAllocator: can't allocate memory: 8"),
    ],
)
def test_a_lack_of_memory_is_one_sentence(tmp_path, name, value):
    error = RuntimeError("cell")
    error.ename, error.evalue = name, value
    sentence, where = str(_failure(error, tmp_path / "a.ipynb")).splitlines()
    assert sentence.startswith("there is not enough memory; lower batch_size") and "a.ipynb" in where
