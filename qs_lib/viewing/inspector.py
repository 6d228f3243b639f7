"""The thought inspector: step through problems and read what a model thought, in a notebook, on a page, as an app."""

import re
from pathlib import Path

import ipywidgets as widgets
from IPython.display import display

from ..errors import WorkbookError
from ..evaluation.episodes import Episode, read_episodes, text_tokens, think_at
from ..files import outputs_root, write_bytes
from .edit import MOST_CHARACTERS, Answered, answer_with, plain_words
from .escape import safe_option, safe_text
from .html import MOST_TOKENS, STYLE, disagree, heading, helped, overview, page, render, right, spacing, wrong

FILTERS = {
    "all": lambda episodes: episodes,
    "wrong": lambda episodes: [e for e in episodes if wrong(e)],
    "right": lambda episodes: [e for e in episodes if right(e)],
    "thoughts disagree": lambda episodes: [e for e in episodes if disagree(e)],
    "most helped": lambda episodes: sorted((e for e in episodes if helped(e) > 0), key=helped, reverse=True),
    "most hurt": lambda episodes: sorted((e for e in episodes if helped(e) < 0), key=helped),
}
SORTS = {
    "as chosen": None,
    "utility, best first": lambda e: -helped(e),
    "coherence, best first": lambda e: -mean_coherence(e),
    "hardest first": lambda e: -e.difficulty,
    "most different answers first": lambda e: -len({t.answer for t in e.thoughts}),
}
NOTHING = ""  # beside the first checkpoint; None would leave its button unmarked
DRAWN = {"num_thoughts": 4, "thought_length": 28, "thought_temperature": 1.0}  # without a model's configuration
WIDE = {"description_width": "initial"}


def mean_coherence(episode: Episode) -> float:
    """Return the mean composite coherence of the episode's thoughts (0 to 1), 0 where there are none."""
    return sum(t.coherence.get("composite", 0.0) for t in episode.thoughts) / max(1, len(episode.thoughts))


class ThoughtInspector(widgets.VBox):
    """Controls over a list of episodes and one view of the chosen one. With a model it draws thoughts, and answers with
    an edited one.

    - ``episodes``: a list of ``Episode``, an ``episodes.jsonl``, or a dict of name -> either. The first one's problems
      can be chosen, another is shown beside it.
    - ``model``: a ``QuietStarForCausalLM`` for the first name, or a dict of name -> model, where a name may lack
      episodes. Without a model nothing can be drawn, everything else works.
    - ``tokenizer``: what all models read with. ``scale``: the ``Scale`` their coherence is measured on.

    One line of controls says where one is, the other is the group that ``panel`` opens. Every control is an attribute:
    ``inspector.index.value = 3`` is the same as clicking. ``view`` is what they change. Raises ``WorkbookError`` if
    there is nothing to inspect or a model lacks its tokenizer.
    """

    def __init__(self, episodes=(), model=None, tokenizer=None, scale=None):
        named = dict(episodes) if isinstance(episodes, dict) else {"": episodes}
        self.models = model if isinstance(model, dict) else {} if model is None else {next(iter(named)): model}
        if self.models and tokenizer is None:
            example = "ThoughtInspector(..., model=model, tokenizer=tokenizer)"
            raise WorkbookError(f"a model needs its tokenizer to read a text: {example}")
        self.tokenizer, self.scale = tokenizer, scale
        self.sets = {name: _episodes(named.get(name, ())) for name in dict.fromkeys([*named, *self.models])}
        self.episodes = next(iter(self.sets.values()))
        if not self.episodes and not self.models:
            raise WorkbookError("there is nothing to inspect: give at least one episode")
        self.found = {name: {(e.question, e.position): e for e in one} for name, one in self.sets.items()}
        self.edits, self._drawn = {}, {}  # (name, question, position) -> number, original, edited; what can be edited
        self._busy = True  # while controls are set together, the view waits
        try:
            self._make_controls()
            self._make_live_controls()
            super().__init__(self._rows())
            self.add_class("qs-live")
            self._busy = False
            self._choose()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every control and let go of the models. ipywidgets keeps all that is open, and what it calls back."""
        controls = [value for value in vars(self).values() if isinstance(value, widgets.Widget)]
        for widget in [part for control in (*controls, *self.children, self.layout) for part in _with_parts(control)]:
            widget.close()
        super().close()
        self.models = {}

    def _make_controls(self) -> None:
        others = [(safe_option(name), name) for name in list(self.sets)[1:]]
        self.filter, self.sort, self.strip = _choice(list(FILTERS)), _choice(list(SORTS)), _choice([])
        self.index, self.token = _field("Problem", value=1, min=1, max=1), _field("Token", max=0)
        self.strip.add_class("qs-strip")
        self.strip.layout.flex = "1 1 400px"  # leaves room for a button on its line
        chosen = others[0][1] if others else NOTHING
        self.beside = _choice([("nothing", NOTHING), *others], value=chosen)
        self.count, self.view, self.status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.previous = _button("Previous", lambda: self.step(-1))
        self.next = _button("Next", lambda: self.step(1))
        self.file = _field("File name", widgets.Text, "300px", value="thoughts.html")
        self.save = _button("Save as HTML", self._act(self._save))
        acts = {"filter": self._choose, "sort": self._choose, "index": self._open, "token": self._move}
        for name, act in (acts | {"strip": self._click, "beside": self._show}).items():
            getattr(self, name).observe(act, "value")

    def _make_live_controls(self) -> None:
        settings = getattr(next(iter(self.models.values()), None), "config", None)
        number, length, heat = (getattr(settings, n, v) for n, v in DRAWN.items())
        self.thoughts = _field("Thoughts", value=number, min=1, max=32)
        self.length = _field("Longest", value=length, min=3, max=256)
        self.temperature = _field("Temperature", widgets.BoundedFloatText, "150px", value=heat, max=5, step=0.1)
        self.seed = _field("Seed", max=2**31 - 1)
        self.draw = _button("Draw thoughts here", self._act(self.think))
        self.edited, self.words = _choice([]), _field("in plain words", widgets.Text, "350px")
        self.answer = _button("Answer with it", self._act(self.edit))
        self.edited.observe(self._spell, "value")
        self.own_text = _field("Your text", widgets.Text, "45%")
        self.own_truth = _field("What follows, if known", widgets.Text, "300px")
        self.read_own = _button("Read this text", self._act(self._read_own))

    def _rows(self) -> list:
        live = bool(self.models)
        groups = {"Filter": (self.filter,), "Order": (self.sort,)}
        groups |= {"Compare": (self.beside,)} if len(self.sets) > 1 else {}
        groups["Tokens"] = (self.strip, self.draw)[: 1 + live]
        if live:
            groups["Draw"] = (self.thoughts, self.length, self.temperature, self.seed, self.draw)
            groups["Edit"] = (self.edited, self.words, self.answer)
            groups["Own text"] = (self.own_text, self.own_truth, self.read_own)
        self.groups = groups | {"Save": (self.file, self.save)}
        self.panel, self.line = _choice(list(self.groups)), _row()
        self.panel.observe(self._group, "value")
        self._group()
        return [_row(self.previous, self.index, self.next, self.count, self.token, self.panel), self.line, self.view]

    def _group(self, change=None) -> None:
        self.status.value, self.line.children = "", (*self.groups[self.panel.value], self.status)

    def step(self, by: int) -> None:
        """Move by so many problems, inside the list."""
        self.index.value = min(max(1, self.index.value + by), self.index.max)

    def think(self) -> list[Episode]:
        """Draw thoughts at the chosen token with the settings of the controls, by every model in view, and show them.

        Returns their episodes. Raises ``WorkbookError`` if that cannot be done.
        """
        names = [n for n in self._names() if n in self.models]
        if not names or self.current is None:
            raise WorkbookError("there is nothing to draw: give a model, and choose a problem or write a text")
        question, place, seed = self.current.question, self.token.value, self.seed.value
        self._check_reading()
        settings = {"num_thoughts": self.thoughts.value, "thought_length": self.length.value, "seed": seed}
        settings |= {"temperature": self.temperature.value, "answer": self.current.answer, "scale": self.scale}
        drawn = []
        for name in names:

            def tell(done, of, what, name=name):
                self._say(f"{name} {what} ({done} of {of})".strip())

            settings["stage"] = f"{name} live, temperature {self.temperature.value:g}, seed {seed}".strip()
            drawn.append(think_at(self.models[name], self.tokenizer, question, place, progress=tell, **settings))
        shared = {"problem": self.current.problem, "family": self.current.family, "difficulty": self.current.difficulty}
        for name, episode in zip(names, drawn, strict=True):
            self.found[name][question, place] = episode.model_copy(update=shared)
            self.edits.pop((name, question, place), None)
        self._say(f"drawn with seed {seed}; the next draw takes another")
        self.seed.value += 1
        self._show()
        return drawn

    def _check_reading(self) -> None:
        if len(self.current.tokens) and self._tokens()[: len(self.current.tokens)] != self.current.tokens:
            raise WorkbookError("the tokenizer reads this text otherwise than the model that made these episodes did")

    def edit(self) -> list[Answered]:
        """Answer with the chosen thought alone, as it is and in the words of the control, and show both.

        Returns the two. Raises ``WorkbookError`` if that cannot be done, and then nothing changes.
        """
        if self.edited.value is None:
            raise WorkbookError("there is no thought to edit: give a model, and draw thoughts here first")
        self._check_reading()
        name, number = self.edited.value
        where = self.current.question, self.token.value
        both = [self._drawn[name, number].tokens, self.words.value]
        made = answer_with(self.models[name], self.tokenizer, where[0], both, where[1], self.current.answer)
        self.edits[name, *where] = (number, *made)
        self._say("")  # no error any more
        self._show()
        return made

    def read(self, text: str, truth: str | None = None) -> None:
        """Put one's own text at the end of the problems and open it. ``truth``: what follows it, where that is known.

        Raises ``WorkbookError`` without a model, and for a text without a word.
        """
        if not self.models or not text.strip():
            raise WorkbookError("a text of one's own needs a model to think about it, and at least one word")
        tokens = text_tokens(self.tokenizer, text[:MOST_CHARACTERS])  # think_at refuses a longer one
        known = {"problem": len(self.episodes), "question": text, "answer": truth or None, "family": "own text"}
        self.episodes.append(Episode(**known, position=len(tokens) - 1, tokens=tokens, thoughts=[]))
        self._busy = True
        self.filter.value, self.sort.value = "all", "as chosen"
        self._busy = False
        self._choose(place=len(self.episodes))

    def _act(self, do):
        """Return what a button calls. It has nowhere to show a traceback, so what goes wrong is said in a sentence."""

        def act():
            self.draw.disabled = True  # a second click would wait and draw again
            try:
                do()
            except (ValueError, NotImplementedError, OSError) as error:
                self._say(str(error))
            finally:
                self.draw.disabled = False

        return act

    def _read_own(self) -> None:
        self.read(self.own_text.value, self.own_truth.value)
        self._say("read; now draw thoughts at its last token, or at another")

    def _save(self) -> None:
        name = re.sub(r"[^\w.-]", "_", Path(self.file.value).name).lstrip(".") or "thoughts.html"
        folder = outputs_root() / "inspector"
        folder.mkdir(parents=True, exist_ok=True)
        self.save_html(folder / name)
        self._say(f"saved as {folder.parent.name}/inspector/{name}")

    def _say(self, text: str) -> None:
        self.status.value = _status(text)

    def _choose(self, change=None, place: int = 1) -> None:
        if self._busy:
            return
        self.shown = list(FILTERS[self.filter.value](self.episodes))
        if SORTS[self.sort.value]:
            self.shown.sort(key=SORTS[self.sort.value])
        self._busy = True
        self.index.max = max(1, len(self.shown))
        self.index.value = place
        self._busy = False
        self._open()

    def _open(self, change=None) -> None:
        """Another problem: its tokens and its own position."""
        if self._busy:
            return
        self._busy = True
        tokens = self._tokens()
        first = max(0, len(tokens) - MOST_TOKENS)
        own = self.current.position if self.current else 0
        self.token.max = max(0, own, len(tokens) - 1)
        self.token.value = own
        # numbered: the front end finds the chosen label by its text
        self.strip.options = [(f"{i} {safe_option(t, 24)}", i) for i, t in enumerate(tokens[first:], first)]
        self.strip.value = self.token.value if first <= self.token.value < len(tokens) else None
        self._busy = False
        self._show()

    def _move(self, change=None) -> None:
        if not self._busy:
            self.strip.value = self.token.value if self.token.value in {i for _, i in self.strip.options} else None
            self._show()

    def _click(self, change=None) -> None:
        if not self._busy and self.strip.value is not None:
            self.token.value = self.strip.value

    def _show(self, change=None) -> None:
        if self._busy:
            return
        place = self.index.value
        self.previous.disabled, self.next.disabled = place <= 1, place >= len(self.shown)
        self.count.value = _status(f"{place if self.shown else 0} of {len(self.shown)}")
        self._offer()
        self.view.value = self.current_html()

    def _offer(self) -> None:
        """Offer the thoughts in view to be edited, and spell the first one where they are others than before."""
        where = (self.current.question, self.token.value) if self.current else None
        shown = {n: self.found[n][where].thoughts for n in self._names() if n in self.models and where in self.found[n]}
        drawn = {(name, k): t for name, thoughts in shown.items() for k, t in enumerate(thoughts, 1)}
        if drawn != self._drawn:
            self._drawn = drawn
            self.edited.options = [(f"{safe_option(name, 12)} {k}".strip(), (name, k)) for name, k in drawn]
            self.edited.value = next(iter(drawn), None)
            self._spell()

    def _spell(self, change=None) -> None:
        tokens = self._drawn[self.edited.value].tokens if self.edited.value else []
        self.words.value = plain_words(spacing(tokens).join(tokens)).encode("utf-8", "replace").decode()

    def _names(self) -> list[str]:
        """The first checkpoint and the one beside it."""
        return [next(iter(self.sets)), *([self.beside.value] if self.beside.value != NOTHING else [])]

    def _tokens(self) -> list[str]:
        """All tokens of the problem in view where a model is there, else those read up to its last episode."""
        if self.current is None:
            return []
        if self.models and len(self.current.question) <= MOST_CHARACTERS:
            return text_tokens(self.tokenizer, self.current.question)
        return self.current.tokens

    @property
    def current(self) -> Episode | None:
        """Return the problem in view, None where the filter leaves none."""
        return self.shown[self.index.value - 1] if self.shown else None

    def current_html(self) -> str:
        """Return what the view shows, as HTML."""
        if not self.episodes:
            return "<p>No problem was given: write a text of your own.</p>"
        if self.current is None:
            return f"<p>No problem matches &quot;{safe_text(self.filter.value)}&quot;.</p>"
        return STYLE + self._compared(self.current, self.token.value)

    def _compared(self, episode: Episode, place: int) -> str:
        names = self._names()
        ones = [self._one(episode, self.found[name].get((episode.question, place)), name, place) for name in names]
        title = next((heading(one) for one in ones if isinstance(one, Episode)), "")
        parts = []
        for name, one in zip(names, ones, strict=True):
            edit = self.edits.get((name, episode.question, place))
            parts.append(f"<h3>{safe_text(name)}</h3>" if name else "")
            parts[-1] += f"<p>{safe_text(one)}</p>" if isinstance(one, str) else render(one, False, False, edit)
        if len(parts) == 1:
            return page(title) + parts[0]
        return page(title) + f"<div class='qs-pair'>{''.join(f'<div>{part}</div>' for part in parts)}</div>"

    def _one(self, episode: Episode, one: Episode | None, name: str, place: int) -> Episode | str:
        """What to show of a model at a token: an episode, or a sentence that says why there is none."""
        if one is None and name in self.models:
            read = self._tokens()[: place + 1] if episode is self.current else episode.tokens
            known = episode.model_dump(include={"problem", "question", "answer", "family", "difficulty"})
            return Episode(**known, position=place, tokens=read, thoughts=[])
        if one is None and place != episode.position:
            return "No thoughts were saved at this token; with a model they can be drawn."
        return "This question is not among its episodes." if one is None else one

    def static_html(self, listed: int = 50) -> str:
        """Return HTML that needs no kernel: the problem in view, and a table of those the filter leaves."""
        title = f"<p><b>{safe_text(self.filter.value)}</b>: {len(self.shown)} of {len(self.episodes)} problems</p>"
        return f"<div class='qs-twin'>{self.current_html()}{title}{overview(self.shown, listed)}</div>"

    def save_html(self, path: str | Path, most: int = 200) -> Path:
        """Write a page that opens anywhere, offline: the view, a table, the first ``most`` problems of the filter."""
        body = "<hr>".join(self._compared(e, e.position) for e in self.shown[:most])
        whole = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Thoughts</title>"
            f"<meta name='color-scheme' content='light dark'>{STYLE}</head>"
            f"<body style='font-family:sans-serif'><h1>Thoughts</h1>{self.current_html()}<hr>"
            f"<h2>Problems</h2>{overview(self.shown, most)}{body}</body></html>"
        )
        write_bytes(Path(path), whole.encode())
        return Path(path)

    def __repr__(self):
        return f"ThoughtInspector({len(self.episodes)} episodes)"

    def _ipython_display_(self):
        """Show the widget and the same as HTML, which is hidden beside a widget that works.

        In JupyterLab a widget whose kernel is gone leaves only an error, whatever else its output holds.
        """
        if self._repr_mimebundle_ is not None:  # not closed
            display(self._repr_mimebundle_(), raw=True)
        display({"text/html": self.static_html(), "text/plain": f"{self!r} as it was when shown"}, raw=True)


def _episodes(source) -> list[Episode]:
    return read_episodes(source) if isinstance(source, (str, Path)) else list(source)


def _with_parts(widget):
    """Yield a widget, its children, layout and style, and theirs."""
    yield widget
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            yield from _with_parts(part)


def _choice(options, **settings):
    choice = widgets.ToggleButtons(options=options, style={"button_width": "auto"}, **settings)
    choice.add_class("qs-choice")
    return choice


def _field(name: str, kind=widgets.BoundedIntText, width="130px", **settings):
    return kind(description=name, layout={"width": width}, style=WIDE, continuous_update=False, **settings)


def _button(name: str, act):
    button = widgets.Button(description=name, layout={"width": "auto"})
    button.on_click(lambda _: act())
    return button


def _status(text) -> str:
    """The text as a message that a screen reader speaks."""
    return f"<span role='status'>{safe_text(text)}</span>"


def _row(*controls):
    return widgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "center"})
