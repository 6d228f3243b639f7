"""The inspector in a real JupyterLab, as people use it: by mouse, by keys alone, after a restart, as an app, a page."""

import html
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
from drive import IDLE, free_port, serve
from hostile import HIT, HOSTILE

from qs_lib.evaluation.episodes import Episode, Thought, read_episodes
from qs_lib.files import find_run
from qs_lib.viewing.escape import safe_text
from qs_lib.viewing.inspector import ThoughtInspector
from qs_lib.viewing.pick import FILTERS

pytestmark = pytest.mark.browser
NOTEBOOK = "notebooks/04_parallel_thoughts.ipynb"
COMMITTED = read_episodes(find_run("") / "06_anti_theater" / "episodes.jsonl")  # what the inspectors of notebooks show
KEPT = {name: len(kept(COMMITTED)) for name, kept in FILTERS.items()}


@pytest.fixture
def expect():
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def inspector_of(page):
    """The inspector's live widget."""
    box = page.locator(".widget-vbox.qs-live").last
    box.wait_for(timeout=60_000)
    box.scroll_into_view_if_needed()
    return box


def view_of(box):
    return box.locator("> .widget-html").last


def button(box, name):
    return box.get_by_role("button", name=name, exact=True)


def number(box, name):
    return box.get_by_label(name, exact=True)


def fits(page, box, view):
    """Whether two lines of controls and four thoughts of each of two checkpoints stand on 1,400 x 1,000 pixels."""
    size = page.viewport_size
    page.set_viewport_size({"width": 1400, "height": 1000})
    box.evaluate("e => e.scrollIntoView()")
    first, shown = box.bounding_box(), view.get_by_role("rowheader", name="Thought 4", exact=True).all()
    assert len(shown) == 2 and view.bounding_box()["y"] - first["y"] < 80
    last = max(row.bounding_box()["y"] + row.bounding_box()["height"] for row in shown)
    assert last < 950, last
    wide = view.evaluate(
        "e => [...e.querySelectorAll('*')].filter(x => x.scrollWidth > x.clientWidth + 1 && x.clientWidth)"
    )
    assert not wide, wide
    page.set_viewport_size(size)


def test_by_mouse(open_lab, expect, shot):
    page = open_lab(NOTEBOOK)
    box = inspector_of(page)
    view = view_of(box)
    expect(view).to_contain_text("Thought 1")
    shot("04-opened", box)
    fits(page, box, view)
    button(box, "all").click()
    expect(box).to_contain_text("1 of 80")
    button(box, "Next").click()
    expect(box).to_contain_text("2 of 80")
    expect(view).to_contain_text("mia had some cards")
    button(box, "thoughts disagree").click()
    expect(box).to_contain_text(f"1 of {KEPT['thoughts disagree']}")
    button(box, "all").click()
    before = view.inner_text()
    button(box, "Order").click()
    button(box, "hardest first").click()
    expect(view).not_to_have_text(before)
    button(box, "as chosen").click()
    expect(view).to_contain_text("ana rides 3 hours")
    button(box, "Tokens").click()
    button(box, "5 at").click()
    expect(number(box, "Token")).to_have_value("5")
    expect(view).to_contain_text("No thoughts have been drawn here")
    button(box, "Draw thoughts here").click()
    expect(box).to_contain_text("; next: seed", timeout=60_000)
    expect(view.locator("h3")).to_have_text(["after RL", "baked"])
    expect(view).to_contain_text("truth: 3 miles . how")
    left, right = (h.bounding_box() for h in view.locator("h3").all())
    assert left["y"] == right["y"] and left["x"] < right["x"], "two checkpoints stand side by side"
    shot("04-two-checkpoints", box)
    button(box, "Compare").click()
    button(box, "nothing").click()
    expect(view.locator("h3")).to_have_text(["after RL"])
    expect(button(box, "nothing")).to_have_class(re.compile("mod-active"))
    button(box, "Draw").click()
    number(box, "Thoughts").fill("2")
    number(box, "Thoughts").press("Enter")
    number(box, "Temperature").fill("2")
    number(box, "Temperature").press("Enter")
    button(box, "Draw thoughts here").click()
    expect(view).to_contain_text("temperature 2")
    assert "Thought 2" in view.inner_text() and "Thought 3" not in view.inner_text()
    button(box, "Edit").click()
    number(box, "in plain words").fill("step 9 - 2 = 7")
    number(box, "in plain words").press("Tab")
    button(box, "Answer with it").click()
    expect(view).to_contain_text("Thought 1 edited: the answer")
    expect(view).to_contain_text("<think> <step> 9 - 2 = 7 </think>")
    number(box, "in plain words").fill("zorp")
    number(box, "in plain words").press("Tab")
    button(box, "Answer with it").click()
    expect(box).to_contain_text("does not know the word 'zorp'")
    expect(view).to_contain_text("<think> <step> 9 - 2 = 7 </think>")
    shot("04-edited", box)
    button(box, "Own text").click()
    number(box, "Your text").fill("ana has 3 cups . ana finds 4 . how many cups has ana ?")
    number(box, "Your text").press("Tab")
    button(box, "Read this text").click()
    expect(box).to_contain_text("81 of 81")
    button(box, "Draw").click()
    button(box, "Draw thoughts here").click()
    expect(view).to_contain_text("truth: not known", timeout=60_000)
    assert "nats" not in view.inner_text()
    shot("04-own-text", box)
    button(box, "Save").click()
    button(box, "Save file").click()
    expect(box).to_contain_text("inspector/thoughts.html")
    assert not page.watch.dialogs and not page.watch.errors and not page.watch.requests, vars(page.watch)


def tabs_to(page, name: str, key: str = "Tab", most: int = 80):
    """Press a key until the control of that name has the focus."""
    focused = "() => [document.activeElement.innerText || '', document.activeElement.labels?.[0]?.innerText || '']"
    for _ in range(most):
        text, label = (t.strip() for t in page.evaluate(focused))
        if name in (text, label):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{name} cannot be reached with {key}")


def test_by_keyboard_alone(open_lab, expect, shot):
    page = open_lab(NOTEBOOK)
    cells = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.length")
    box = inspector_of(page)
    view = view_of(box)
    tab_to = partial(tabs_to, page)

    def enter(*where):
        tab_to(*where)
        page.keyboard.press("Enter")

    def overwrite(name, text):
        tab_to(name)
        page.keyboard.press("Control+a")
        page.keyboard.type(text)

    button(box, "all").focus()  # from here on only keys
    page.keyboard.press("Enter")
    expect(box).to_contain_text("1 of 80")
    enter("Next", "Shift+Tab")
    expect(box).to_contain_text("2 of 80")
    page.keyboard.press("Space")
    expect(box).to_contain_text("3 of 80")
    tab_to("Problem", "Shift+Tab")
    page.keyboard.press("ArrowUp")
    expect(box).to_contain_text("4 of 80")
    page.keyboard.press("Control+a")
    page.keyboard.type("40")
    page.keyboard.press("Enter")
    expect(box).to_contain_text("40 of 80")
    tab_to("most hurt")
    page.keyboard.press("Space")
    expect(box).to_contain_text(f"1 of {KEPT['most hurt']}")
    enter("Order", "Shift+Tab")
    enter("hardest first")
    tab_to("Token", "Shift+Tab")
    expect(box).to_contain_text(f"1 of {KEPT['most hurt']}")
    was = int(number(box, "Token").input_value())
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(view).to_contain_text(f"text read up to token {was - 2}")
    enter("Compare")
    enter("nothing")
    expect(view.locator("h3")).to_have_text(["after RL"])
    enter("Draw", "Shift+Tab")
    overwrite("Thoughts", "3")
    enter("Draw thoughts here")
    expect(view).to_contain_text("Thought 3", timeout=60_000)
    assert "Thought 4" not in view.inner_text()
    enter("Edit", "Shift+Tab")
    overwrite("in plain words", "step 9 - 2 = 7")
    tab_to("Answer with it")
    page.keyboard.press("Space")
    expect(view).to_contain_text("Thought 1 edited: the answer")
    enter("Own text", "Shift+Tab")
    tab_to("Your text")
    page.keyboard.type("ben has 9 nuts . ben sells 2 . how many nuts has ben ?")
    tab_to("What follows, if known")
    page.keyboard.type("7")
    tab_to("Read this text")
    page.keyboard.press("Space")
    expect(box).to_contain_text("81 of 81")
    enter("Draw", "Shift+Tab")
    tab_to("Draw thoughts here")
    page.keyboard.press("Space")
    expect(view).to_contain_text("truth: 7", timeout=60_000)
    enter("Save", "Shift+Tab")
    enter("Save file")
    expect(box).to_contain_text("inspector/thoughts.html")
    shot("04-by-keyboard", box)
    now = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.length")
    assert now == cells, "no key has reached the notebook"


STEPS = """
import qs_lib as qs
model, tokenizer = qs.load_run("")
saved = qs.read_episodes({path!r})[:6]
steps = [
    e.model_copy(update={{"step": 20 * n, "stage": "training", "thoughts": e.thoughts[: 2 * n]}})
    for n in (1, 2, 3)
    for e in saved
]
"""
INSPECTED = "qs.ThoughtInspector(steps, model, tokenizer)"


def notebook_of(source: str, path: Path) -> str:
    """Write a notebook of one cell, and return its name."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path.name


def save_notebook(page):
    """Else JupyterLab asks before its page is left."""
    page.evaluate("() => { window.jupyterapp.commands.execute('docmanager:save') }")
    page.wait_for_timeout(2000)


@pytest.fixture
def steps(environment):
    """The cell that makes three steps of training, each of six problems, with the pocket model beside them."""
    root = Path(__file__).resolve().parents[2] / "outputs"
    made = STEPS.format(path=str(root / "pocket" / "06_anti_theater" / "episodes.jsonl"))
    return f"import os\nos.environ['QS_OUTPUTS'] = {str(root)!r}{made}os.environ['QS_OUTPUTS'] = {environment['QS_OUTPUTS']!r}\n"


def test_steps_heat_map_search_and_a_view_opened_again_by_mouse(open_lab, workbook, environment, steps, expect, shot):
    page = open_lab(notebook_of(steps + INSPECTED, workbook / "steps.ipynb"))
    box = inspector_of(page)
    view = view_of(box)
    expect(view.locator("h3")).to_have_text(["step 20", "step 60"])
    button(box, "Steps").click()
    button(box, "step 40").click()
    expect(view.locator("h3")).to_have_text(["step 40", "step 60"])
    expect(view.get_by_role("rowheader", name="Thought 4", exact=True)).to_have_count(2)
    button(box, "Compare").click()
    button(box, "step 20").click()
    expect(view.locator("h3")).to_have_text(["step 40", "step 20"])
    shot("steps", box)
    button(box, "Filter").click()
    number(box, "Search").fill("SCHOOL")
    number(box, "Search").press("Enter")
    expect(box).to_contain_text("0 of 0")
    expect(view).to_contain_text("No problem matches")
    number(box, "Search").fill("MILES")
    number(box, "Search").press("Enter")
    expect(view).to_contain_text("miles")
    button(box, "Save").click()
    line, told = number(box, "Line that restores this view").input_value(), view.inner_text()
    button(box, "Save file").click()
    expect(box).to_contain_text("inspector/thoughts.html")
    button(box, "Tokens").click()
    expect(view).to_contain_text("entropy of now after each token")
    strip = box.locator(".qs-strip").get_by_role("button")
    colours = strip.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert colours.count("rgba(213, 94, 0, 0.5)") == 1 and len(set(colours)) > 3, colours
    shot("heat-map", box)
    strip.nth(5).click()
    expect(number(box, "Token")).to_have_value("5")
    button(box, "Draw thoughts here").click()
    expect(box).to_contain_text("; next: seed", timeout=60_000)
    expect(view.locator("h3")).to_have_text(["now", "step 20"])
    button(box, "gain").click()
    expect(view).to_contain_text("gain after each token (nats)")
    shot("heat-map-gain", box)
    again = steps + line.replace("...", "steps, model, tokenizer")
    save_notebook(page)
    page = open_lab(notebook_of(again, workbook / "again.ipynb"))
    box = inspector_of(page)
    expect(number(box, "Search")).to_have_value("MILES")
    assert view_of(box).inner_text() == told, "the line opens the same view"
    assert not page.watch.dialogs and not page.watch.errors and not page.watch.requests, vars(page.watch)
    save_notebook(page)
    page.context.set_offline(True)
    page.goto((Path(environment["QS_OUTPUTS"]) / "inspector" / "thoughts.html").as_uri())
    assert page.locator("h3").all_inner_texts()[:2] == ["step 40", "step 20"] and "miles" in page.inner_text("body")
    page.context.set_offline(False)


def test_steps_heat_map_search_and_save_by_keyboard(open_lab, workbook, steps, expect):
    page = open_lab(notebook_of(steps + INSPECTED, workbook / "keys.ipynb"))
    box = inspector_of(page)
    view, tab_to = view_of(box), partial(tabs_to, page)
    button(box, "Filter").focus()  # from here on only keys
    tab_to("Search")
    page.keyboard.type("miles")
    page.keyboard.press("Enter")
    expect(view).to_contain_text("miles")
    tab_to("Steps", "Shift+Tab")
    page.keyboard.press("Enter")
    for name in ("step 40", "step 60"):
        tab_to(name)
        page.keyboard.press("Space")
        expect(view.locator("h3").first).to_have_text(name)
    tab_to("Compare", "Shift+Tab")
    page.keyboard.press("Enter")
    tab_to("step 20")
    page.keyboard.press("Enter")
    expect(view.locator("h3")).to_have_text(["step 60", "step 20"])
    tab_to("Tokens", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(view).to_contain_text("entropy of now after each token")
    tab_to(box.locator(".qs-strip").get_by_role("button").nth(4).inner_text())
    page.keyboard.press("Enter")
    expect(number(box, "Token")).to_have_value("4")
    tab_to("gain")
    page.keyboard.press("Space")
    tab_to("Draw thoughts here")
    page.keyboard.press("Enter")
    expect(view.locator("h3")).to_have_text(["now", "step 20"], timeout=60_000)
    expect(view).to_contain_text("gain after each token (nats)")
    tab_to("Save", "Shift+Tab")
    page.keyboard.press("Enter")
    tab_to("Line that restores this view")
    page.keyboard.press("Control+a")
    chosen = "() => document.activeElement.value.slice(document.activeElement.selectionStart)"
    assert page.evaluate(chosen).startswith("qs.ThoughtInspector(..., view={'front': 'now', ")
    assert not page.watch.dialogs and not page.watch.errors and not page.watch.requests, vars(page.watch)


def test_hostile_text_that_is_typed(open_lab, workbook, steps, expect):
    page = open_lab(notebook_of(steps + "qs.ThoughtInspector(saved, model, tokenizer)", workbook / "typed.ipynb"))
    box = inspector_of(page)
    typed = [text for text in HOSTILE if (HIT in text or "\x1b" in text or "\u202e" in text) and len(text) < 1000]
    assert len(typed) > 30
    for panel, name, act, said in (
        ("Filter", "Search", None, "No problem matches"),
        ("Edit", "in plain words", "Answer with it", "does not know the word"),
        ("Own text", "Your text", "Read this text", "of"),
    ):
        button(box, panel).click()
        for text in typed:
            number(box, name).fill(text)
            number(box, name).press("Enter")
            if act:
                button(box, act).click()
            expect(box).to_contain_text(said)
            harmless(page)
        if not act:
            number(box, name).fill("")
            number(box, name).press("Enter")
            expect(box).to_contain_text("1 of 6")
    expect(box).to_contain_text(f"{6 + len(typed)} of {6 + len(typed)}")
    assert box.locator("script, img, iframe, svg, form, object, embed, link, meta, base, video").count() == 0


PANELS = ("Filter", "Order", "Steps", "Compare", "Draw", "Edit", "Own text", "Save", "Tokens")


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_axe_finds_nothing_serious(theme, open_lab, axe, shot):
    page = open_lab(NOTEBOOK)
    page.evaluate("theme => { window.jupyterapp.commands.execute('apputils:change-theme', {theme}) }", theme)
    page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
    box = inspector_of(page)
    page.wait_for_timeout(1000)
    shot(f"04-{theme.split()[1].lower()}", box)
    page.set_viewport_size({"width": 1400, "height": 6000})  # contrast is measured only where nothing is scrolled away
    box.evaluate("e => e.scrollIntoView()")
    page.wait_for_timeout(1000)
    # JupyterLab's body has no height and hides what overflows: axe would take all of it for invisible
    page.evaluate("() => { document.body.style.height = '100vh'; document.body.style.overflow = 'visible' }")
    page.add_script_tag(path=axe)
    box.evaluate("e => e.id = 'qs-inspector'")
    button(box, "Tokens").click()
    box.evaluate("e => e.querySelectorAll('details').forEach(d => { d.open = true })")
    # a fault of each kind that counts, to see that axe looks here
    faults = "<div id='qs-fault'><button></button><span style='color:#777;background:#888'>pale</span></div>"
    box.evaluate("(e, faults) => e.insertAdjacentHTML('beforeend', faults)", faults)
    found = page.evaluate("() => axe.run('#qs-inspector')")
    assert {"button-name", "color-contrast"} <= {v["id"] for v in found["violations"]}
    page.evaluate("() => document.getElementById('qs-fault').remove()")
    panels = [name for name in PANELS if button(box, name).count()]
    assert len(panels) >= 8 and panels[-1] == "Tokens"  # the last one is looked at more closely
    for name in panels:
        button(box, name).click()
        page.wait_for_timeout(300)
        box.evaluate("e => e.querySelectorAll('details').forEach(d => { d.open = true })")
        found = page.evaluate("() => axe.run('#qs-inspector')")
        serious = [
            (name, v["id"], [n["html"][:200] for n in v["nodes"][:3]])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert not serious and len(found["passes"]) >= 10, json.dumps(serious, indent=1)
    unsure = [n["html"] for v in found["incomplete"] if v["id"] == "color-contrast" for n in v["nodes"]]
    measured = [n for v in found["passes"] if v["id"] == "color-contrast" for n in v["nodes"]]
    assert len(measured) > 300 and len(unsure) < 30, (len(measured), unsure[:10])


def hostile_episode(number: int, text: str) -> Episode:
    thought = Thought(tokens=[text, text], logprobs=[-1.0, -2.0], answer=text, next_tokens=[(text, 0.5)], weight=0.5)
    return Episode(
        problem=number,
        question=text,
        answer=text,
        family=text,
        stage=text,
        position=1,
        tokens=[text, text],
        thoughts=[thought, thought],
        base_tokens=[(text, 0.5)],
        mixed_tokens=[(text, 0.5)],
        answer_without=text,
        answer_with=text,
    )


SHOWN = [html.unescape(safe_text(text)) for text in HOSTILE]


def harmless(page, view=None):
    assert page.evaluate("() => window.qsHit") is None, "a payload has run"
    assert not page.watch.dialogs and not page.watch.requests, vars(page.watch)


def test_hostile_text_in_the_widget(open_lab, workbook, expect, shot):
    path = workbook / "hostile.jsonl"
    path.write_text(
        "\n".join(
            hostile_episode(i, t).model_dump_json()
            if t.isprintable()
            else json.dumps(hostile_episode(i, t).model_dump())
            for i, t in enumerate(HOSTILE)
        )
    )
    source = (
        f"import qs_lib as qs\nepisodes = qs.read_episodes({str(path)!r})\n"
        "qs.ThoughtInspector({'<img src=x onerror=window.qsHit=1>': episodes, "
        "'</button><script>window.qsHit=1</script>': episodes})"
    )
    page = open_lab(notebook_of(source, workbook / "hostile.ipynb"))
    box = inspector_of(page)
    view = view_of(box)
    for place, shown in enumerate(SHOWN, 1):
        expect(box).to_contain_text(f"{place} of {len(SHOWN)}")
        asked = page.evaluate("() => performance.now()")
        page.evaluate("() => new Promise(done => requestAnimationFrame(done))")
        assert page.evaluate("() => performance.now()") - asked < 2000, f"the page froze at {shown[:40]!r}"
        title = view.locator("h4").first
        assert title.evaluate("e => e.textContent") == shown
        assert not shown.strip() or title.evaluate(
            "e => e.getClientRects().length > 0 && e.innerText.trim().length > 0"
        )
        harmless(page)
        if "position:fixed" in shown or "[2 more" in shown or "more marks]" in shown or place == len(SHOWN):
            shot(f"hostile-{place:03}", box)
        if place < len(SHOWN):
            button(box, "Next").click()
    assert box.locator("script, img, iframe, svg, form, object, embed, link, meta, base, video").count() == 0


def test_hostile_text_on_its_page(page, tmp_path, shot):
    path = ThoughtInspector([hostile_episode(i, t) for i, t in enumerate(HOSTILE)]).save_html(tmp_path / "hostile.html")
    page.context.set_offline(True)
    page.goto(path.as_uri())
    titles = page.locator("h4").all_text_contents()
    assert all(shown in titles for shown in SHOWN)
    assert page.locator("script, img, iframe, svg, form, object, embed, link, base, video, textarea").count() == 0
    page.mouse.move(200, 200)
    page.keyboard.press("Tab")
    harmless(page)
    shot("hostile-page")


def test_a_payload_that_is_not_escaped_is_noticed(page, tmp_path):
    """The flag works: the same page with one text put in raw."""
    path = ThoughtInspector([hostile_episode(0, "here")]).save_html(tmp_path / "raw.html")
    path.write_text(path.read_text(encoding="utf-8").replace("<h4>here", f"<h4>{HOSTILE[3]}", 1), encoding="utf-8")
    page.goto(path.as_uri())
    page.wait_for_function("() => window.qsHit === 1", timeout=10_000)


def test_static_twin_with_hostile_text_in_lab(open_lab, workbook, shot):
    """What a reader sees who has no kernel: the text/html beside the widget, formulas included."""
    twin = ThoughtInspector([hostile_episode(i, t) for i, t in enumerate(HOSTILE)]).static_html(listed=len(HOSTILE))
    twin += "".join(f"<p>{i}</p>" for i in range(1))
    output = nbformat.v4.new_output("execute_result", {"text/html": twin, "text/plain": "x"}, execution_count=1)
    cell = nbformat.v4.new_code_cell("x", outputs=[output], execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, workbook / "twin.ipynb")
    page = open_lab("twin.ipynb", run=False)
    table = page.locator(".jp-OutputArea-output table").last
    table.wait_for()
    page.wait_for_timeout(2000)
    told = table.locator("tbody tr td:nth-child(2)").all_text_contents()
    assert told == [html.unescape(safe_text(t, 160)) for t in HOSTILE]
    assert page.locator(".jp-OutputArea-output mjx-container").count() == 0, "no formula is set from what a model wrote"
    harmless(page)
    shot("twin-in-lab")


def test_readable_after_a_restart_and_without_a_kernel(open_lab, workbook, shot):
    page = open_lab(NOTEBOOK)
    box = inspector_of(page)
    assert not page.locator(".qs-twin").last.is_visible(), "beside the live widget its twin is hidden"
    page.evaluate("() => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }")
    page.wait_for_timeout(3000)
    page.wait_for_function(IDLE, timeout=60_000)
    assert box.is_visible()
    readable(page, shot, "04-after-restart")
    save_notebook(page)
    page = open_lab(NOTEBOOK, run=False)  # another kernel, which knows nothing of the widget
    readable(page, shot, "04-reopened")
    assert page.locator(".qs-twin").last.is_visible()


def readable(page, shot, name):
    cell = page.locator(".jp-Cell", has_text="inspector.think()").last
    cell.evaluate("e => e.scrollIntoView()")
    page.wait_for_timeout(1500)
    shot(name)
    text = cell.locator(".jp-OutputArea").inner_text()
    for part in ("Thought 1", "coherence", "Next token", "mixing weight", "after RL", "baked"):
        assert part in text, part


def test_readable_in_html_offline(page, tmp_path, workbook, environment, shot):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "jupyter",
            "nbconvert",
            "--to",
            "html",
            "--output-dir",
            str(tmp_path),
            str(workbook.parent / workbook.name / NOTEBOOK),
        ],
        check=True,
        env=environment,
        capture_output=True,
    )
    page.context.set_offline(True)
    page.goto((tmp_path / "04_parallel_thoughts.html").as_uri())
    text = page.locator("body").inner_text()
    disputed = f"thoughts disagree: {KEPT['thoughts disagree']} of 80 problems"
    for part in ("Thought 1", "coherence", "Next token", disputed):
        assert part in text, part
    page.locator(".qs-episode").first.scroll_into_view_if_needed()
    shot("04-nbconvert")


def test_as_an_app(page, workbook, environment, expect, shot):
    pytest.importorskip("voila", reason="voila is not installed: pip install -e '.[app]'")
    port = free_port()
    command = ["voila", "notebooks/00_start_here.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    for url in serve(command, f"http://127.0.0.1:{port}/voila/static/voila.js", environment, workbook):
        page.goto(url.split("/voila")[0], timeout=120_000)
        box = inspector_of(page)
        button(box, "Next").click()
        expect(box).to_contain_text("2 of 80")
        button(box, "Draw").click()
        button(box, "Draw thoughts here").click()
        expect(view_of(box)).to_contain_text("seed 0", timeout=60_000)
        shot("app", box)
