"""A real JupyterLab and a real Chromium for `make browser`. Where one is missing, the tests say which and skip."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from drive import IDLE, Watch, free_port, serve

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "outputs" / "browser"


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
    names = (os.environ.get("QS_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, filter(None, names))), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except api.Error as error:
            pytest.skip(f"no Chromium to drive (QS_CHROMIUM=path names one): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Private folders for Jupyter, so that a test changes nothing of its user's, and the kernels' own settings."""
    folder = tmp_path_factory.mktemp("jupyter")
    names = {
        "JUPYTER_CONFIG_DIR": "cfg",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "rt",
        "JUPYTERLAB_SETTINGS_DIR": "set",
        "JUPYTERLAB_WORKSPACES_DIR": "ws",
        "IPYTHONDIR": "ipy",
        "QS_OUTPUTS": "qs-outputs-b",
    }
    notices = folder / "set" / "@jupyterlab" / "apputils-extension"
    notices.mkdir(parents=True)
    (notices / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {k: str(folder / v) for k, v in names.items()} | {"PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def workbook(tmp_path_factory):
    """A copy of the notebooks: JupyterLab saves what it opens."""
    folder = tmp_path_factory.mktemp("workbook")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    return folder


@pytest.fixture(scope="session")
def lab(workbook, environment):
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install -e '.[notebooks]'")
    port = free_port()
    yield from serve(
        [
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--port-retries=0",
            "--IdentityProvider.token=",
            "--ServerApp.password=",
            "--ServerApp.disable_check_xsrf=True",
            "--LabApp.expose_app_in_browser=True",
            f"--ServerApp.root_dir={workbook}",
        ],
        f"http://127.0.0.1:{port}",
        environment,
        workbook,
    )


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The script of axe-core, fetched by npm into a temporary folder (or the file that QS_AXE names)."""
    if os.environ.get("QS_AXE"):
        return Path(os.environ["QS_AXE"])
    if not shutil.which("npm"):
        pytest.skip("npm is missing, and QS_AXE does not name an axe.min.js")
    folder = tmp_path_factory.mktemp("axe")
    try:
        done = subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", "axe-core"],
            cwd=folder,
            capture_output=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        done = None
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.is_file():
        pytest.skip(f"npm could not fetch axe-core: {done.stderr.decode()[-200:] if done else 'no answer in 120 s'}")
    return script


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1500})
    page.watch = Watch(page)
    yield page
    page.close()


@pytest.fixture
def open_lab(page, lab):
    """A function that opens a notebook in JupyterLab and, with ``run``, runs all its cells."""

    def opened(path: str, run: bool = True, seconds: float = 240):
        page.goto(f"{lab}/lab/tree/{path}?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function(IDLE, timeout=60_000)
        if run:
            page.evaluate(
                "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
            )  # returns no promise
            page.wait_for_function(
                "() => { const all = [...window.jupyterapp.shell.currentWidget.content.widgets];"
                " const c = all.filter(w => w.model.type === 'code');"
                " return c.every(w => w.model.executionState === 'idle' && w.model.executionCount) }",
                timeout=1000 * seconds,
            )
        return page

    yield opened
    for session in json.load(urllib.request.urlopen(f"{lab}/api/sessions")):
        urllib.request.urlopen(urllib.request.Request(f"{lab}/api/sessions/{session['id']}", method="DELETE")).close()


@pytest.fixture
def shot(page):
    """Save what the browser shows under outputs/browser/, for people to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)

    def save(name, box=None):
        if box:
            box.evaluate("e => e.scrollIntoView()")
        page.screenshot(path=SHOTS / f"{name}.png")

    return save
