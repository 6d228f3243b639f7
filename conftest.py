"""The environment of tests and of the notebooks' kernels, which inherit it."""

import os
import shutil
import tempfile
from pathlib import Path

collect_ignore_glob = ["outputs/*", ".venv/*"]

ROOT = Path(__file__).parent
SCRATCH = tempfile.mkdtemp(prefix="qs-outputs-")

# one thread: sums of floats depend on how many share them (`make refresh` sets the same)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}
os.environ["QS_OUTPUTS"] = SCRATCH
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_unconfigure(config):
    shutil.rmtree(SCRATCH, ignore_errors=True)
