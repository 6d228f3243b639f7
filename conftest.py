"""The environment of tests and of the notebooks' kernels, which inherit it: one for each process of a parallel run."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

collect_ignore_glob = ["outputs/*", ".venv/*"]

ROOT = Path(__file__).parent
SCRATCH = tempfile.mkdtemp(prefix="qs-outputs-")

# one thread: sums of floats depend on how many share them (`make refresh` sets the same)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",  # a saved bar stands still at 0 %
}
os.environ["QS_OUTPUTS"] = SCRATCH
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """The run driver tells its kernels through the environment; no test may inherit it from another."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_finish(session):
    """Keep what was imported out of every collection of garbage: transformers asks for one after each training."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    shutil.rmtree(SCRATCH, ignore_errors=True)
