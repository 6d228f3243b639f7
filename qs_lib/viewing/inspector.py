"""The thought inspector: step through problems and read what a model thought, in a notebook, on a page, as an app."""

import contextlib
import re
from pathlib import Path

import ipywidgets as widgets
from IPython.display import display
from traitlets import TraitError

from ..errors import WorkbookError
from ..evaluation.episodes import STEPS, Episode, text_tokens, think_at
from ..files import outputs_root, write_bytes
from .controls import button, choice, field, row, status, with_parts
from .edit import MOST_CHARACTERS, Answered, answer_with, entropies, plain_words
from .escape import safe_option, safe_text
from .html import MOST_TOKENS, STYLE, coloured, heading, heat, helped, overview, page, render, spacing
from .pick import FILTERS, SORTS, by_step, episodes_of, has, without_thoughts
from .png import save_png

NOTHING = ""  # beside the first checkpoint; None would leave its button unmarked
DRAWN = {"num_thoughts": 4, "thought_length": 28, "thought_temperature": 1.0}  # without a model's configuration
RESTORED = ("front", "filter", "sort", "search", "beside", "index", "token")  # what `view` holds, as it is set


class ThoughtInspector(widgets.VBox):
    """Controls over a list of episodes and a view of one. With a model it draws thoughts, and answers with an edited one.

    - ``episodes``: a list of ``Episode``, an ``episodes.jsonl``, or a dict of name -> either. The first one's problems
      can be chosen, another is shown beside it. Several values of ``Episode.step`` are steps to move through.
    - ``model``: a ``QuietStarForCausalLM`` for the first name, or a dict of name -> model, where a name may lack
      episodes. Without a model nothing can be drawn, everything else works.
    - ``tokenizer``: what all models read with. ``scale``: the ``Scale`` their coherence is measured on.
    - ``view``: what ``view_line`` gives, to open at the same place. Thoughts drawn or edited there are not part of it.

    One line of controls says where one is, the other is the group that ``panel`` opens. Every control is an attribute:
    ``inspector.index.value = 3`` is the same as clicking. ``view`` is what they change. Raises ``WorkbookError`` if
    there is nothing to inspect, a model lacks its tokenizer or the view is not one of these episodes.
    """

    def __init__(self, episodes=(), model=None, tokenizer=None, scale=None, view=None):
        named = dict(episodes) if isinstance(episodes, dict) else {"": episodes}
        models = model if isinstance(model, dict) else {} if model is None else {next(iter(named)): model}
        if models and tokenizer is None:
            example = "ThoughtInspector(..., model=model, tokenizer=tokenizer)"
            raise WorkbookError(f"a model needs its tokenizer to read a text: {example}")
        self.tokenizer, self.scale = tokenizer, scale
        self.sets, self.models, self.steps = {}, {}, {}
        for name in dict.fromkeys([*named, *models]):
            one = by_step(episodes_of(named.get(name, ())), name, name in models)
            self.sets, self.steps = self.sets | one, self.steps or one  # what can be shown, and stand in front
            self.models |= {list(one)[-1]: models[name]} if name in models else {}
        if not next(iter(self.sets.values())) and not self.models:
            raise WorkbookError("there is nothing to inspect: give at least one episode")
        self.found = {name: {(e.question, e.position): e for e in one} for name, one in self.sets.items()}
        self.edits, self._drawn = {}, {}  # (name, question, position) -> number, original, edited; what can be edited
        self._unsure = {}  # (name, question) -> entropy of each token
        self._busy = True  # while controls are set together, the view waits
        try:
            self._make_controls()
            self._make_live_controls()
            super().__init__(self._rows())
            self.add_class("qs-live")
            self._busy = False
            self._choose()
            self.restore(view or {})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every control and let go of the models. ipywidgets keeps all that is open, and what it calls back."""
        controls = [value for value in vars(self).values() if isinstance(value, widgets.Widget)]
        for widget in [part for control in (*controls, *self.children, self.layout) for part in with_parts(control)]:
            widget.close()
        super().close()
        self.models = {}

    def _make_controls(self) -> None:
        several, labels = len(self.steps) > 1, {name: (safe_option(name), name) for name in self.sets}
        others = [labels[name] for name in list(self.sets)[1 - several :]]
        self.front = choice([labels[name] for name in self.steps])
        self.filter, self.sort, self.strip = choice(list(FILTERS)), choice(list(SORTS)), choice([])
        self.search = field("Search", widgets.Text, "240px", placeholder="in problems and thoughts")
        self.index = field("Problem", width="120px", value=1, min=1, max=1)
        self.token = field("Token", width="105px", max=0)
        self.strip.add_class("qs-strip")
        self.strip.layout.flex = "1 1 400px"  # leaves room for a button on its line
        self.strip.add_class(f"qs-{id(self)}")  # for the colours of its tokens
        colours = ["entropy", "gain"][not self.models :]
        self.colour = choice(colours, description="colour by", layout={"width": "max-content"})
        last = [name for name, episodes in self.steps.items() if any(e.thoughts for e in episodes)][-1:]
        chosen = next(iter(last if several else [name for _, name in others]), NOTHING)
        self.beside = choice([("nothing", NOTHING), *others], value=chosen)
        self.count, self.view, self.status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.count.layout.margin = "2px 10px 2px 2px"
        self.previous = button("Previous", lambda: self.step(-1))
        self.next = button("Next", lambda: self.step(1))
        self.file = field("File name (.html or .png)", widgets.Text, "300px", value="thoughts.html")
        self.save = button("Save file", self._act(self._save))
        self.link = field("Line that restores this view", widgets.Text, "45%")
        acts = dict.fromkeys(("filter", "sort", "search"), self._choose) | {"front": self._advance}
        acts |= {"index": self._open, "token": self._move, "strip": self._click}
        for name, act in (acts | dict.fromkeys(("beside", "colour"), self._show)).items():
            getattr(self, name).observe(lambda _, act=act: self._busy or act(), "value")

    def _make_live_controls(self) -> None:
        settings = getattr(next(iter(self.models.values()), None), "config", None)
        number, length, heat = (getattr(settings, n, v) for n, v in DRAWN.items())
        self.thoughts = field("Thoughts", value=number, min=1, max=32)
        self.length = field("Longest", value=length, min=3, max=256)
        self.temperature = field("Temperature", widgets.BoundedFloatText, "150px", value=heat, max=5, step=0.1)
        self.seed = field("Seed", max=2**31 - 1)
        self.draw = button("Draw thoughts here", self._act(self.think))
        self.bar = widgets.IntProgress(layout={"width": "120px", "visibility": "hidden"})
        self.edited, self.words = choice([]), field("in plain words", widgets.Text, "350px")
        self.answer = button("Answer with it", self._act(self.edit))
        self.edited.observe(self._spell, "value")
        self.own_text = field("Your text", widgets.Text, "45%")
        self.own_truth = field("What follows, if known", widgets.Text, "300px")
        self.read_own = button("Read this text", self._act(self._read_own))

    def _rows(self) -> list:
        live = bool(self.models)
        groups = {"Filter": (self.filter, self.search), "Order": (self.sort,)}
        groups |= {"Steps": (self.front,)} if len(self.steps) > 1 else {}
        groups |= {"Compare": (self.beside,)} if len(self.sets) > 1 else {}
        groups["Tokens"] = (self.strip, self.colour, *(self.draw, self.bar)[: 2 * live])
        if live:
            groups["Draw"] = (self.thoughts, self.length, self.temperature, self.seed, self.draw, self.bar)
            groups["Edit"] = (self.edited, self.words, self.answer)
            groups["Own text"] = (self.own_text, self.own_truth, self.read_own)
        self.groups = groups | {"Save": (self.file, self.save, self.link)}
        self.panel, self.line = choice(list(self.groups)), row()
        self.panel.observe(self._group, "value")
        self._group()
        return [row(self.previous, self.index, self.next, self.count, self.token, self.panel), self.line, self.view]

    def _group(self, change=None) -> None:
        self.status.value, self.line.children = "", (*self.groups[self.panel.value], self.status)
        self._show()

    def step(self, by: int) -> None:
        """Move by so many problems, inside the list."""
        self.index.value += by

    def think(self) -> list[Episode]:
        """Draw and return thoughts at the chosen token, by all models in view. Raises ``WorkbookError`` if it fails."""
        names = self._drawing()
        if not names or self.current is None:
            raise WorkbookError("there is nothing to draw: give a model, and choose a problem or write a text")
        was, place, seed = self.current, self.token.value, self.seed.value
        self._check_reading()
        settings = {"num_thoughts": self.thoughts.value, "thought_length": self.length.value, "seed": seed}
        settings |= {"temperature": self.temperature.value, "answer": was.answer, "scale": self.scale}
        drawn, self.bar.max = [], len(names) * len(STEPS)
        for turn, name in enumerate(names):

            def tell(done, of, what, turn=turn, name=name):
                self.bar.value = turn * of + done
                self._say(f"{name} {what} ({done} of {of})".strip())

            settings["stage"] = f"{name} live, temperature {self.temperature.value:g}, seed {seed}".strip()
            drawn.append(think_at(self.models[name], self.tokenizer, was.question, place, progress=tell, **settings))
        shared = {"problem": was.problem, "family": was.family, "difficulty": was.difficulty}
        for name, episode in zip(names, drawn, strict=True):
            new = self.found[name][was.question, place] = episode.model_copy(update=shared)
            self.edits.pop((name, was.question, place), None)
            if self._at(name, was, place) is was:  # table and filters see the new thoughts too
                self.episodes[:] = [new if e is was else e for e in self.episodes]
                self.shown = [new if e is was else e for e in self.shown]
        self._say(f"drawn with seed {seed}; next: seed {seed + 1}")
        self.seed.value += 1
        self._show()
        return drawn

    def _drawing(self) -> list[str]:
        """The names in view that have a model. Where all are steps of the past, what it is now comes to the front."""
        own = next((n for n in self.steps if n in self.models), None)
        if own is not None and not any(n in self.models for n in self._names()):
            self._take_all()
            self.front.value = own
        return [n for n in self._names() if n in self.models]

    def _check_reading(self) -> None:
        if self._tokens()[: len(self.current.tokens)] != self.current.tokens:
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
        """Open a text of one's own, with its ``truth`` if known. Raises ``WorkbookError`` without a model or a word."""
        if not self.models or not text.strip():
            raise WorkbookError("a text of one's own needs a model to think about it, and at least one word")
        tokens = text_tokens(self.tokenizer, text[:MOST_CHARACTERS])  # think_at refuses a longer one
        self._drawing()
        known = {"problem": len(self.episodes), "question": text, "answer": truth or None, "family": "own text"}
        self.episodes.append(Episode(**known, position=len(tokens) - 1, tokens=tokens, thoughts=[]))
        self._take_all()
        self._choose(place=len(self.episodes))

    def _take_all(self) -> None:
        self._busy = True
        self.filter.value, self.sort.value, self.search.value = "all", "as chosen", ""
        self._busy = False

    def _act(self, do):
        """Return what a button calls. It has nowhere to show a traceback, so what goes wrong is said in a sentence."""

        def act():
            self.draw.disabled = True  # a second click would wait and draw again
            self.bar.layout.visibility = "visible"
            try:
                do()
            except (ValueError, NotImplementedError, OSError) as error:
                self._say(str(error))
            finally:
                self.draw.disabled, self.bar.layout.visibility, self.bar.value = False, "hidden", 0

        return act

    def _read_own(self) -> None:
        self.read(self.own_text.value, self.own_truth.value)
        self._say("read; now draw thoughts at its last token, or at another")

    def _save(self) -> None:
        name = re.sub(r"[^\w.-]", "_", Path(self.file.value).name).lstrip(".") or "thoughts.html"
        folder = outputs_root() / "inspector"
        folder.mkdir(parents=True, exist_ok=True)
        picture = name.endswith(".png") and self.current
        save_png(self.current, folder / name) if picture else self.save_html(folder / name)
        self._say(f"saved as {folder.parent.name}/inspector/{name}")

    def _say(self, text: str) -> None:
        self.status.value = status(text)

    def _choose(self, place: int = 1) -> None:
        self.shown = [e for e in FILTERS[self.filter.value](self.episodes) if has(e, self.search.value)]
        self.shown.sort(key=SORTS[self.sort.value])
        self._busy = True
        self.index.max = max(1, len(self.shown))
        self.index.value = place
        self._busy = False
        self._open()

    def _advance(self) -> None:
        """Another step of training: the problem and the token in view stay, unless the filter leaves them out there."""
        was, token = self.current, self.token.value
        self._choose()
        for place, e in enumerate(self.shown, 1):
            if was and (e.question, e.position) == (was.question, was.position):
                self.index.value, self.token.value = place, token
                break

    def _open(self) -> None:
        """Another problem: its tokens and its own position."""
        self._busy = True
        tokens = self._tokens()
        first = max(0, len(tokens) - MOST_TOKENS)
        own = self.current.position if self.current else 0
        self.token.max = max(0, own, len(tokens) - 1)
        self.token.value = own
        # numbered: the front end finds the chosen label by its text
        self.strip.options = [(f"{i} {safe_option(t, 24)}", i) for i, t in enumerate(tokens[first:], first)]
        self._busy = False
        self._move()

    def _move(self) -> None:
        self.strip.value = self.token.value if self.token.value in {i for _, i in self.strip.options} else None
        self._show()

    def _click(self) -> None:
        if self.strip.value is not None:
            self.token.value = self.strip.value

    def _show(self) -> None:
        if self._busy:
            return
        place = self.index.value
        self.previous.disabled, self.next.disabled = place <= 1, place >= len(self.shown)
        self._offer()
        before = self.strip.options[0][1] - 1 if self.strip.options else 0
        rule = f".qs-{id(self)} button:nth-child(%d) {{ background: %s }}"  # the numbers are in the view
        rules = [rule % (i - before, colour) for i, colour in heat(*self._heat()).items()]
        count = status(f"{place if self.shown else 0} of {len(self.shown)}")
        self.count.value = f"{count}<style>{' '.join(rules)}</style>"
        self.view.value, self.link.value = self.current_html(), self.view_line()

    def _heat(self) -> tuple[str, dict[int, float]]:
        """What the tokens of the problem in view are coloured by while they are shown, and its values (nats) by place."""
        what, name, question = self.colour.value, self.front.value, self.current.question if self.current else ""
        if self.panel.value != "Tokens" or not question:
            return what, {}
        if what == "gain":
            known = {place: e for (text, place), e in self.found[name].items() if text == question and e.thoughts}
            return what, {place: helped(e) for place, e in known.items() if e.answer is not None}
        name = next((n for n in (*self._names(), *self.models) if n in self.models), "")
        if (name, question) not in self._unsure and self.models:
            with contextlib.suppress(WorkbookError):  # drawing says it
                self._unsure[name, question] = entropies(self.models[name], self.tokenizer, question)
        return f"entropy of {name}" if name else what, dict(enumerate(self._unsure.get((name, question), ())))

    def _offer(self) -> None:
        """Offer the thoughts in view to be edited, and spell the first one where they are others than before."""
        names = (n for n in self._names() if n in self.models and self.current)
        shown = {n: one for n in names if (one := self._at(n, self.current, self.token.value))}
        drawn = {(name, k): t for name, one in shown.items() for k, t in enumerate(one.thoughts, 1)}
        if drawn != self._drawn:
            self._drawn = drawn
            self.edited.options = [(f"{safe_option(name, 12)} {k}".strip(), (name, k)) for name, k in drawn]
            self.edited.value = next(iter(drawn), None)
            self._spell()

    def _spell(self, change=None) -> None:
        tokens = self._drawn[self.edited.value].tokens if self.edited.value else []
        self.words.value = plain_words(spacing(tokens).join(tokens)).encode("utf-8", "replace").decode()

    def _names(self) -> list[str]:
        """What is in front and what is beside it."""
        return list(dict.fromkeys([self.front.value, *([self.beside.value] if self.beside.value != NOTHING else [])]))

    def _tokens(self) -> list[str]:
        """All tokens of the problem in view where a model is there, else those read up to its last episode."""
        if self.current is None:
            return []
        if self.models and len(self.current.question) <= MOST_CHARACTERS:
            return text_tokens(self.tokenizer, self.current.question)
        return self.current.tokens

    @property
    def episodes(self) -> list[Episode]:
        """Return all problems of what is in front."""
        return self.sets[self.front.value]

    @property
    def current(self) -> Episode | None:
        """Return the problem in view, None where the filter leaves none."""
        return self.shown[self.index.value - 1] if self.shown else None

    def current_html(self) -> str:
        """Return what the view shows, as HTML."""
        if not self.episodes:
            return "<p>No problem was given: write a text of your own.</p>"
        if self.current is None:
            searched = self.search.value and f" and has &quot;{safe_text(self.search.value, 80)}&quot;"
            return f"<p>No problem matches &quot;{safe_text(self.filter.value)}&quot;{searched}.</p>"
        return STYLE + self._compared(self.current, self.token.value)

    def _compared(self, episode: Episode, place: int) -> str:
        names = self._names()
        ones = [self._one(episode, self._at(name, episode, place), name, place) for name in names]
        what, values = self._heat() if episode is self.current else ("", {})
        read = coloured(self._tokens(), what, values) if values else ""
        title = next((heading(one, read) for one in ones if isinstance(one, Episode)), "")
        parts = []
        for name, one in zip(names, ones, strict=True):
            edit = self.edits.get((name, episode.question, place))
            parts.append(f"<h3>{safe_text(name)}</h3>" if name else "")
            parts[-1] += f"<p>{safe_text(one)}</p>" if isinstance(one, str) else render(one, edit, alone=False)
        if len(parts) == 1:
            return page(title) + parts[0]
        return page(title) + f"<div class='qs-pair'>{''.join(f'<div>{part}</div>' for part in parts)}</div>"

    def _at(self, name: str, episode: Episode, place: int) -> Episode | None:
        """What is known at a token. In front a problem has its own thoughts: two may have the same question."""
        own = name == self.front.value and place == episode.position
        return episode if own else self.found[name].get((episode.question, place))

    def _one(self, episode: Episode, one: Episode | None, name: str, place: int) -> Episode | str:
        """What to show of a model at a token: an episode, or a sentence that says why there is none."""
        if one is None and name in self.models:
            read = self._tokens()[: place + 1] if episode is self.current else episode.tokens
            return without_thoughts(episode, position=place, tokens=read)
        if one is None and place != episode.position:
            return "No thoughts were saved at this token; with a model they can be drawn."
        return "This question is not among its episodes." if one is None else one

    def view_line(self) -> str:
        """Return the line of Python that opens the view as it is now. Put your own arguments for the dots."""
        return f"qs.ThoughtInspector(..., view={ {name: getattr(self, name).value for name in RESTORED}!a})"

    def restore(self, view: dict) -> None:
        """Open what ``view`` says. Raises ``WorkbookError`` naming what is not there."""
        if unknown := sorted(set(view) - set(RESTORED), key=str):
            raise WorkbookError(f"a view has no {unknown[0]!r}, only {', '.join(RESTORED)}")
        for name in (name for name in RESTORED if name in view):
            control = getattr(self, name)
            with contextlib.suppress(TraitError):
                control.value = view[name]
            if control.value != view[name]:
                raise WorkbookError(f"the view's {name} {view[name]!r} is not among these episodes: leave it out")

    def static_html(self, listed: int = 50) -> str:
        """Return HTML that needs no kernel: the problem in view, and a table of those the filter leaves."""
        title = f"<p><b>{safe_text(self.filter.value)}</b>: {len(self.shown)} of {len(self.episodes)} problems</p>"
        body = f"<div class='qs-list'>{overview(self.shown, listed)}</div>"
        return f"<div class='qs-twin'>{self.current_html()}{title}{body}</div>"

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
