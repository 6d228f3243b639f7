"""The inspector's controls, as ``CONTRIBUTING.md`` asks for them: with a name, and of use with the keyboard alone."""

import ipywidgets as widgets

from .escape import safe_text

WIDE = {"description_width": "initial"}


def with_parts(widget):
    """Yield a widget, its children, layout and style, and theirs."""
    yield widget
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            yield from with_parts(part)


def choice(options, **settings):
    """Return buttons of which one is chosen."""
    choice = widgets.ToggleButtons(options=options, style=WIDE | {"button_width": "auto"}, **settings)
    choice.add_class("qs-choice")
    return choice


def field(name: str, kind=widgets.BoundedIntText, width="130px", **settings):
    """Return a box for a number or a text, which tells once it is left."""
    return kind(description=name, layout={"width": width}, style=WIDE, continuous_update=False, **settings)


def button(name: str, act):
    """Return a button that calls ``act()``."""
    button = widgets.Button(description=name, layout={"width": "auto"})
    button.on_click(lambda _: act())
    return button


def status(text) -> str:
    """Return the text as a message that a screen reader speaks."""
    return f"<span role='status'>{safe_text(text)}</span>"


def row(*controls):
    """Return controls side by side, on more lines where they do not fit."""
    return widgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "center"})
