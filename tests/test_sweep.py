"""Sweeps on a toy notebook: the grid, three engines, a killed worker, resuming."""

import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest
from test_run import ALONE, PARAMETERS

from qs_lib.errors import ParameterError, WorkbookError
from qs_lib.files import REPOSITORY, read_rows
from qs_lib.workbook import sweep
from qs_lib.workbook.run import run_stage

CHECK = f"""{ALONE}import json, time
from qs_lib.workbook.params import NotebookParams
from qs_lib.workbook.stage import start_stage
class Toy(NotebookParams):
    data: str = ""
    steps: int = 3
P = Toy.from_notebook(globals())"""
FIRST = """stage = start_stage(P, "01_first")
time.sleep(0.5)
assert P.steps < 90, "too many steps"
stage.finish({"squared": P.steps**2, "text": "x", "list": [1]})"""
SECOND = """stage = start_stage(P, "02_second", needs=("01_first",))
earlier = json.loads((stage.need("01_first") / "run.json").read_text())
stage.finish({"squared": -earlier["parameters"]["steps"], "half": P.steps / 2})"""


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("QS_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs" / "sweeps"


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "params" / "01_first").mkdir(parents=True)
    for name, body in (("01_first", FIRST), ("02_second", SECOND)):
        cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, CHECK, body)]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")
    return folder


def toy_points(notebooks, steps, stages=("01_first",), **settings):
    return sweep.points_of("toy", [notebooks / f"{name}.ipynb" for name in stages], {"steps": steps}, **settings)


def test_grids_and_names():
    assert sweep.parse_grid(
        ["steps=1,2", "mixing=hidden,log_probs", "lr=1e-3", "flag=true", 'models=["10M","30M"]']
    ) == {"steps": [1, 2], "mixing": ["hidden", "log_probs"], "lr": [0.001], "flag": [True], "models": [["10M", "30M"]]}
    assert sweep.point_name({"steps": 3, "lr": 0.1}) == "steps-3.lr-0.1"
    odd = [sweep.point_name({"text": text}) for text in ("a b", "a/b", "x" * 80, "x" * 81)]
    assert len(set(odd)) == 4 and all(len(name) <= 64 and "/" not in name for name in odd)
    for words in (["seed=0,1", "seed=2"], ["a=1", "b=2", "a=1"], ["n_true=1", "n_true=1"]):
        with pytest.raises(ParameterError, match="is given twice: write all its values"):
            sweep.parse_grid(words)


def test_bad_sweeps_are_one_sentence_before_anything_runs(notebooks, outputs, tmp_path, capsys):
    for grid, words in (({"stepz": [1]}, "did you mean steps"), ({"run_name": ["a"]}, "unknown parameter 'run_name'")):
        with pytest.raises(ParameterError, match=words):
            sweep.points_of("toy", [notebooks / "01_first.ipynb"], grid)
    for words in ("steps", "steps="):
        with pytest.raises(ParameterError, match="name=value"):
            sweep.parse_grid([words])
    (tmp_path / "s.yaml").write_text("notebooks: [05_rl]\ngrid: {seed: 1}\nz: 1\n")
    for what, sentence in (
        ("05_rl", "at least one parameter"),
        ("nothing", "no sweep file"),
        (str(tmp_path / "s.yaml"), "'z'"),
    ):
        assert sweep.main([what]) == 1 and sentence in capsys.readouterr().err
    with pytest.raises(ParameterError, match="must be pool, dask, slurm"):
        list(sweep.run_points([], "ray"))
    assert not outputs.exists()


def test_a_missing_engine_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(WorkbookError, match=r"install it with `pip install -e \.\[sweep\]`"):
        list(sweep.run_points([], "slurm"))


def test_the_module_runs_as_a_command_whose_engines_are_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", "05_rl", "--engine", "slurm"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delitem(sys.modules, "qs_lib.workbook.sweep")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("qs_lib.workbook.sweep", run_name="__main__")
    assert ended.value.code == 1 and "at least one parameter" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((REPOSITORY / "params" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_made_sweeps_fit_their_notebooks(path):
    assert path.read_text().startswith("#"), "the first line says what question it answers, its cost and machine"
    plan = sweep.read_sweep(path.stem)
    notebooks = [REPOSITORY / "notebooks" / f"{name}.ipynb" for name in plan["notebooks"]]
    points = sweep.points_of(path.stem, notebooks, plan["grid"], plan["variant"])
    assert len({p["run"] for p in points}) == len(points) > 3 and plan["x"] in plan["grid"]
    summaries = [
        json.loads((REPOSITORY / f"outputs/pocket/{name}/run.json").read_text())["summary"]
        for name in plan["notebooks"]
    ]
    every_run = {"seconds": 0, "peak_memory_mb": 0}
    listed = next(row for row in sweep.ready_made() if row["name"] == path.stem)
    assert (
        listed["runs"] == len(points)
        and listed["question"].count("?") == 1
        and listed["command"] == f"make sweep X={path.stem}"
    )
    assert all(any(y in known for known in (every_run, *summaries)) for y in plan["y"])


def test_committed_results_are_of_the_sweep_that_is_there_and_say_what_made_them():
    found = {path.stem: sweep.committed_rows(path.stem) for path in (REPOSITORY / "params" / "sweeps").glob("*.yaml")}
    assert found["memory"] and sweep.committed_rows("nothing") == []
    for name, rows in found.items():
        grid = sweep.read_sweep(name)["grid"]
        assert all(row[parameter] in values for row in rows for parameter, values in grid.items())
        assert all(
            re.match(r"python -m qs_lib\.(workbook\.)?sweep ", row["command"]) and row["commit"] and row["machine"]
            for row in rows
        )


def test_a_line_of_the_figure_for_what_varies_besides_x_and_the_seed():
    rows = [
        {"run": str(i), "a": a, "seed": s, "b": b, "c": 9, "seconds": 1, "y": i}
        for i, (a, s, b) in enumerate(itertools.product(*[(1, 2)] * 3))
    ]
    drawn = sweep.figure([*rows, {"run": "x", "a": 1, "error": "ended"}], "a", [], ["a", "seed", "b", "c"])
    (axis,) = drawn.axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["b 1", "b 2"] and axis.get_ylabel() == "y"
    assert (
        len({line.get_linestyle() for line in axis.lines[::2]})
        == len({line.get_marker() for line in axis.lines[::2]})
        == 2
    )
    assert axis.lines[0].get_ydata().tolist() == [1.0, 5.0]  # means over seeds of rows 0, 2 and 4, 6
    assert sweep.figure([{"run": "x", "error": "ended"}], "a", [], ["a"]) is None


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_hands_the_schedulers_address_on():
    words = ["make", "-n", "-o", ".venv/installed", "sweep", "X=n_true", "E=dask", "A=tcp://h:8786", "W=3"]
    said = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert '"n_true"' in said and '--engine dask --address "tcp://h:8786" --workers 3' in " ".join(said.split())


def test_the_command_line_runs_what_is_missing_and_keeps_what_is_done(notebooks, outputs, capfd):
    words = [str(notebooks / "01_first.ipynb"), "steps=3,99", "--name", "toy", "--workers", "1"]
    assert sweep.main(words) == 1
    good, bad = read_rows(outputs / "toy/sweep.csv")
    assert (
        good["run"] == "steps-3"
        and good["steps"] == 3
        and good["squared"] == 9
        and good["text"] == "x"
        and "list" not in good
    )
    assert good["command"].endswith("--name toy --workers 1") and good["commit"] and "1 threads)" in good["machine"]
    assert bad["error"] == "01_first: AssertionError: too many steps" and "squared" not in bad
    out = capfd.readouterr().out
    assert (
        "[2/2]" in out and "toy bar" not in out and "running, not run yet" in (outputs / "toy/steps-3/.log").read_text()
    )
    assert (outputs / "toy/sweep.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((outputs / "toy/steps-3/01_first/run.json").read_text())
    assert record["command"].startswith("python -m qs_lib.workbook.sweep") and record["threads"] in (None, 1)


def test_a_finished_stage_is_kept_and_a_chain_reads_its_own_run(notebooks, outputs, monkeypatch):
    ran, upstream = [], outputs / "toy/steps-3"
    upstream.mkdir(parents=True)
    one, both = (toy_points(notebooks, [3], stages)[0] for stages in (("01_first",), ("01_first", "02_second")))
    alone, first = (
        toy_points(notebooks, [8], (stage,), upstream=str(upstream))[0] for stage in ("02_second", "01_first")
    )
    monkeypatch.setattr(
        sweep, "run_stage", lambda path, *rest, **more: ran.append(path.stem) or run_stage(path, *rest, **more)
    )
    assert sweep.run_point(one)["squared"] == 9
    stamp = (outputs / "toy/steps-3/01_first/run.json").stat().st_mtime_ns
    row = sweep.run_point(both)
    assert (row["squared"], row["02_second.squared"], row["half"]) == (9, -3, 1.5) and ran == [
        "01_first",
        "01_first",
        "02_second",
    ]
    assert (outputs / "toy/steps-3/01_first/run.json").stat().st_mtime_ns == stamp

    # the second stage alone reads the first from another run, and running the first later does not write into that run
    assert sweep.run_point(alone)["squared"] == -3
    assert (outputs / "toy/steps-8/01_first").is_symlink()
    assert sweep.run_point(first)["squared"] == 64
    assert not (outputs / "toy/steps-8/01_first").is_symlink()
    assert (upstream / "01_first/run.json").stat().st_mtime_ns == stamp


def test_submitit_runs_the_same_points(notebooks, outputs):
    pytest.importorskip("submitit")
    rows = sweep.run_sweep("toy", toy_points(notebooks, [2, 5]), engine="slurm", workers=1, address="local")
    assert [(r["run"], r.get("squared", r)) for r in rows] == [("steps-2", 4), ("steps-5", 25)]


def test_a_dask_sweep_of_six_runs_survives_a_killed_worker(notebooks, outputs, tmp_path):
    dask = pytest.importorskip("dask")
    distributed = pytest.importorskip("dask.distributed")
    killed = []

    def kill_one(client):
        while not list(outputs.glob("toy/*/01_first/.01_first.ipynb")):  # a notebook is being executed
            time.sleep(0.05)
        busy = [w for w, keys in client.processing().items() if keys]
        pids = client.run(os.getpid, workers=busy[:1])
        killed.extend(pids.values())
        os.kill(killed[0], signal.SIGKILL)

    with dask.config.set(
        {"distributed.worker.multiprocessing-method": "fork"}
    ):  # a fresh Python would import torch again
        cluster = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
        )
    with cluster, distributed.Client(cluster, set_as_default=False) as client:
        thread = threading.Thread(target=kill_one, args=(client,), daemon=True)
        thread.start()
        rows = sweep.run_sweep("toy", toy_points(notebooks, range(6)), engine="dask", address=cluster.scheduler_address)
    assert killed and [r.get("error") for r in rows] == [None] * 6
    assert (
        [r["squared"] for r in rows]
        == [0, 1, 4, 9, 16, 25]
        == [r["squared"] for r in read_rows(outputs / "toy/sweep.csv")]
    )
