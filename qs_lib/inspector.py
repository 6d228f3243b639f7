"""The thought inspector: step through problems and read what the model thought, in a notebook, on a page or as an app."""

from pathlib import Path

import ipywidgets as widgets

from .episode import Episode, read_episodes
from .escape import safe_text
from .files import write_bytes
from .params import WorkbookError
from .render import STYLE, disagree, helped, overview, render, right

FILTERS = {
    "all": lambda episodes: episodes,
    "wrong": lambda episodes: [e for e in episodes if not right(e)],
    "right": lambda episodes: [e for e in episodes if right(e)],
    "thoughts disagree": lambda episodes: [e for e in episodes if disagree(e)],
    "most helped": lambda episodes: sorted((e for e in episodes if helped(e) > 0), key=helped, reverse=True),
    "most hurt": lambda episodes: sorted((e for e in episodes if helped(e) < 0), key=helped),
}


class ThoughtInspector(widgets.VBox):
    """Controls over a list of episodes and one view of the chosen one. Needs no model.

    ``episodes``: a list of :class:`~qs_lib.episode.Episode`, an ``episodes.jsonl``, or a dict of name -> either, whose
    entries are shown one below the other for the same question (the first one's questions can be chosen). ``filter``,
    ``index`` and ``view`` are the widgets: setting ``inspector.index.value = 3`` is the same as clicking.
    """

    def __init__(self, episodes):
        named = episodes if isinstance(episodes, dict) else {"": episodes}
        self.sets = {name: _episodes(one) for name, one in named.items()}
        self.episodes = next(iter(self.sets.values()))
        self.others = {
            name: {(e.question, e.position): e for e in one} for name, one in list(self.sets.items())[1:]
        }
        self.shown = list(self.episodes)
        self.filter = widgets.ToggleButtons(options=list(FILTERS), description="Show", tooltips=list(FILTERS))
        self.index = widgets.BoundedIntText(value=1, min=1, max=1, description="Problem")
        self.count = widgets.HTML()
        self.previous, self.next = (widgets.Button(description=d) for d in ("Previous", "Next"))
        self.view = widgets.HTML()
        self.previous.on_click(lambda _: self.step(-1))
        self.next.on_click(lambda _: self.step(1))
        self.filter.observe(self._choose, "value")
        self.index.observe(self._show, "value")
        super().__init__([self.filter, widgets.HBox([self.previous, self.index, self.next, self.count]), self.view])
        self._choose()

    def step(self, by: int) -> None:
        """Move by so many problems; stays inside the list."""
        self.index.value = min(max(1, self.index.value + by), self.index.max)

    def _choose(self, change=None) -> None:
        self.shown = list(FILTERS[self.filter.value](self.episodes))
        with self.index.hold_trait_notifications():
            self.index.max = max(1, len(self.shown))
            self.index.value = 1
        self._show()

    def _show(self, change=None) -> None:
        place = self.index.value
        self.previous.disabled, self.next.disabled = place <= 1, place >= len(self.shown)
        self.count.value = f"<span role='status'>{place if self.shown else 0} of {len(self.shown)}</span>"
        self.view.value = self.current_html()

    @property
    def current(self) -> Episode | None:
        """The episode in view, None where the filter leaves none."""
        return self.shown[self.index.value - 1] if self.shown else None

    def current_html(self) -> str:
        """What the view shows, as HTML."""
        if self.current is None:
            return f"<p>No problem matches &quot;{safe_text(self.filter.value)}&quot;.</p>"
        return STYLE + self._compared(self.current)

    def _compared(self, episode: Episode) -> str:
        names = list(self.sets)
        parts = [(names[0], episode)] + [(n, self.others[n].get((episode.question, episode.position))) for n in names[1:]]
        html = ""
        for name, one in parts:
            html += f"<h3>{safe_text(name)}</h3>" if name else ""
            html += render(one, style=False) if one else "<p>This question is not among its episodes.</p>"
        return html

    def static_html(self, listed: int = 50) -> str:
        """The state as HTML that needs no kernel: the problem in view, and a table of those the filter leaves."""
        title = f"<p><b>{safe_text(self.filter.value)}</b>: {len(self.shown)} of {len(self.episodes)} problems</p>"
        return f"<div>{self.current_html()}{title}{overview(self.shown, listed)}</div>"

    def save_html(self, path: str | Path, most: int = 200) -> Path:
        """Write a page that opens anywhere, offline: the table, and the first ``most`` problems the filter leaves."""
        body = "<hr>".join(self._compared(e) for e in self.shown[:most])
        page = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Thoughts</title>"
            f"<meta name='color-scheme' content='light dark'>{STYLE}</head>"
            f"<body style='font-family:sans-serif'><h1>Thoughts</h1>{overview(self.shown, most)}{body}</body></html>"
        )
        write_bytes(Path(path), page.encode())
        return Path(path)

    def __repr__(self):
        return f"ThoughtInspector({len(self.episodes)} episodes)"

    def _repr_mimebundle_(self, **kwargs):
        data = super()._repr_mimebundle_(**kwargs)
        data["text/html"] = self.static_html()
        return data


def _episodes(source) -> list[Episode]:
    episodes = read_episodes(source) if isinstance(source, (str, Path)) else list(source)
    if not episodes:
        raise WorkbookError("there is nothing to inspect: give at least one episode")
    return episodes
