"""Episodes as HTML. The same serves the live inspector, its static twin and saved pages.

It reads well without its style, which GitHub drops, and says in words or numbers what it also says in colour.
"""

import re
from collections.abc import Iterable

from ..evaluation.episodes import Episode, Thought
from ..stats import fixed
from .escape import safe_text, safe_token

# of Okabe and Ito's palette, which colour-blind readers tell apart
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
PARTS = ("composite", "semantic", "syntactic", "predictive")
MOST_TOKENS, MOST_THOUGHTS = 256, 64
HARD = 4.0  # nats at which a token of a story has its full colour
STYLE = """<style>
.qs-episode { color: var(--jp-ui-font-color1, inherit); font-size: 14px; line-height: 1.45; }
.qs-episode h4, .qs-episode p, .qs-episode b, .qs-episode td { overflow-wrap: anywhere; unicode-bidi: isolate; }
.qs-episode table { border-collapse: collapse; margin: 4px 0; font-size: 13px; }
.qs-episode th, .qs-episode td { text-align: left !important; vertical-align: top; padding: 2px 4px; background: none;
  color: inherit; border: 1px solid rgba(128, 128, 128, 0.4); unicode-bidi: isolate; }
.jp-OutputArea:has(.qs-live) .qs-twin { display: none; }
.qs-list { max-height: 320px; overflow-y: auto; }
.qs-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 24px; }
.qs-pair > div { min-width: 0; }
.qs-pair h3 { margin: 8px 0 2px; font-size: 15px; }
.qs-episode h4 { margin: 10px 0 2px; font-size: 14px; }
.qs-episode p { margin: 2px 0; }
.qs-episode summary { cursor: pointer; overflow-wrap: anywhere; unicode-bidi: isolate; }
.qs-episode th { font-size: 12px; }
.qs-episode th[scope=row] { white-space: nowrap; }
.qs-episode th:nth-child(2) { width: 100%; }
.qs-episode td:nth-child(n+4):last-child { overflow-wrap: normal; }
.qs-choice .widget-toggle-button { padding: 0 8px; }
.qs-strip .widget-toggle-button { margin: 1px; padding: 0 5px; height: auto; font-family: monospace; }
.qs-choice .mod-active { outline: 2px solid var(--jp-ui-font-color1, currentColor); outline-offset: -2px; \
font-weight: bold; }
.qs-strip > div { max-height: 64px; overflow-y: auto; padding: 2px; }
</style>"""


def shade(strength: float, colour: str = ORANGE) -> str:
    """Return a colour of the palette with an opacity of ``strength`` (0 to 1), for CSS."""
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:], 16)},{strength:.2f})"


def heat(what: str, values: dict[int, float]) -> dict[int, str]:
    """Return the colour of each value, half opaque for the largest one. It is orange, and blue for a ``gain`` above 0."""
    most = max(map(abs, values.values()), default=0.0) or 1.0
    return {i: shade(abs(v) / most / 2, BLUE if what == "gain" and v > 0 else ORANGE) for i, v in values.items()}


def helped(episode: Episode) -> float:
    """Return the mean utility of the episode's thoughts (nats), 0 where it is not known. Above 0 they helped."""
    return sum(t.utility or 0.0 for t in episode.thoughts) / max(1, len(episode.thoughts))


def right_or_wrong(given: str, truth: str | None) -> str:
    """Return "right" or "wrong", or that the truth is not known."""
    return "truth not known" if truth is None else "right" if given == truth else "wrong"


def render(episode: Episode, edit=None, alone: bool = True) -> str:
    """Return one problem: its answers, a row for every thought, and what opens on demand.

    ``edit``: number, original and edited thought (two ``Answered``) to set side by side. ``alone``: with style and text.
    """
    thoughts = episode.thoughts[:MOST_THOUGHTS]
    first = {(*t.tokens, t.answer): k for k, t in reversed(list(enumerate(thoughts, 1)))}
    known = episode.answer is not None
    titles = ["thought", "text (unlikely tokens in colour)", "leads to", "mixing weight", "coherence"]
    titles += ["gain (nats)"] if known else []
    rows = [_thought(k, t, first[(*t.tokens, t.answer)], known) for k, t in enumerate(thoughts, 1)]
    body = _answers(episode) + (_edited(*edit) if edit else "") + (_table(titles, "".join(rows)) if rows else "")
    if len(episode.thoughts) > len(thoughts):
        body += f"<p>{len(episode.thoughts) - len(thoughts)} more thoughts are not shown.</p>"
    body += _predictions(episode, thoughts)
    return STYLE + page(heading(episode) + body) if alone else page(body)


def page(body: str) -> str:
    """Return HTML as a part of the page that the style reaches."""
    body = left(body)
    return f"<div class='qs-episode tex2jax_ignore mathjax_ignore'>{body}</div>"


def left(html: str) -> str:
    """Return HTML with the cells of its tables on the left, where nobody trusts a notebook and its style is dropped too."""
    return re.sub(r"<(td|th)\b(?! scope='row')", r"<\1 style='text-align: left'", html)


def _table(titles: Iterable[str], body: str) -> str:
    """A table of titled columns. The titles are this library's own words."""
    head = "".join(f"<th scope='col'>{t}</th>" for t in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def coloured(tokens: list[str], what: str, values: dict[int, float]) -> str:
    """Return a text as HTML, each token with the colour and the number of its value (nats of ``what``, by place)."""
    words, colours = [], heat(what, values)
    for i, token in list(enumerate(tokens))[-MOST_TOKENS:]:
        colour, number = colours.get(i, "none"), f" <i>{_nats(values[i])}</i>" if i in values else ""
        words.append(f"<span style='background:{colour}'>{safe_token(token)}{number}</span>")
    return f"{safe_text(what)} after each token (nats): {' '.join(words)}"


def telling(told: dict) -> str:
    """Return a story as HTML: orange where the plain model finds a token hard, framed where the gain head thinks first.

    ``told``: from ``experiments/anywhere.json``. A framed token says what the thought gained, in nats.
    """
    words = []
    for word, plain, gain, thinks in zip(told["words"], told["plain"], told["gain"], told["thinks"], strict=True):
        colour = shade(min(1.0, -plain / HARD)) + ";border:2px solid;border-radius:4px;padding:0 2px" * thinks
        number = f"<sub>{gain:+.1f}</sub>" if thinks else ""
        words.append(f"<span style='background:{colour}'>{safe_text(word, 40)}{number}</span>")
    body = spacing(told["words"]).join(words)
    return f"<p style='line-height:2.2'>{body}</p>"


def heading(e: Episode, read: str = "") -> str:
    """Return the text of a problem and what is known of it before a model has read it.

    ``read``: its tokens as HTML, to be shown at once in place of the plain ones that open on demand.
    """
    opened = " open" if read else ""
    read = read or " ".join(safe_token(t) for t in e.tokens[-MOST_TOKENS:])
    facts = [f"problem {e.problem}", *([f"<span>family {safe_text(e.family)}</span>"] if e.family else [])]
    facts += [f"difficulty {e.difficulty}"] if e.difficulty else []
    return (
        f"<h4>{safe_text(e.question)}</h4><details{opened}><summary>{', '.join(facts)}; text read up to token {e.position}"
        f"</summary><p>{read}</p></details>"
    )


def _answers(e: Episode) -> str:
    steps = [] if e.step is None else [f"step {e.step:,d}"]
    facts = [f"<span>stage {safe_text(e.stage)}</span>"] if e.stage and [e.stage] != steps else []
    facts += steps
    if not e.thoughts:
        return f"<p>{'; '.join([*facts, 'No thoughts have been drawn here.'])}</p>"
    facts += [f"truth: <b>{'not known' if e.answer is None else safe_text(e.answer)}</b>"]
    for name, given in (("without thoughts", e.answer_without), ("with thoughts", e.answer_with)):
        known = "" if e.answer is None else f" ({right_or_wrong(given, e.answer)})"
        facts += [f"{name} <b>{safe_text(given) or '(nothing)'}</b>" + known]
    facts += [] if e.answer is None else [f"the thoughts {_effect(helped(e))} on average"]
    return f"<p>{'; '.join(facts)}</p>"


def _effect(utility: float) -> str:
    effect = "helped" if utility > 0.05 else "hurt" if utility < -0.05 else "made no difference"
    return f"{effect} ({fixed(utility, 2, signed=True)} nats)"


def _thought(number: int, t: Thought, first: int, gain: bool) -> str:
    words = f"word for word thought {first:d}"
    if first == number:
        numbers = " ".join(f"{safe_token(x)} <i>{_nats(p)}</i>" for x, p in _shown(t))
        facts = [f"{name} {t.coherence[name]:.2f}" for name in PARTS if name in t.coherence]
        facts += [f"reward {_nats(t.reward)}, advantage {_nats(t.advantage)}"] if t.reward or t.advantage else []
        words = (
            f"<details><summary>{_words(t)}</summary><p role='group' aria-label='tokens of thought {number}'>"
            f"log-probs: {numbers}</p><p>{', '.join(facts)}</p></details>"
        )
    numbers = [t.weight, t.coherence.get("composite")]
    rows = "".join(f"<td>{'' if x is None else _nats(x)}</td>" for x in numbers)
    rows += "<td>" + fixed(t.utility or 0.0, 2, signed=True) + "</td>" if gain else ""
    return f"<tr><th scope='row'>Thought {number}</th><td>{words}</td><td><b>{safe_token(t.answer)}</b></td>{rows}</tr>"


def _shown(t: Thought) -> list[tuple[str, float]]:
    return list(zip(t.tokens, t.logprobs, strict=False))[:MOST_TOKENS]


def _words(t: Thought) -> str:
    """The thought as running text, each token in the colour of its surprise."""
    spans, left = [], len(t.tokens) - len(_shown(t))
    for token, p in _shown(t):
        colour = shade(min(0.5, max(0.0, -p) * 0.2))
        spans.append(f"<span style='background:{colour}'>{safe_text(token, 200)}</span>")
    return spacing(t.tokens).join(spans) + (f" ({left} more tokens are not shown)" if left else "")


def spacing(tokens: list[str]) -> str:
    """Return what stands between tokens in a text: nothing where they bring their own spaces."""
    return "" if any(t.startswith(" ") for t in tokens) else " "


def _nats(value: float) -> str:
    return fixed(value, 2)


def _edited(number: int, before, after) -> str:
    titles = ["alone", "text", "leads to", *["truth's probability"] * (before.truth is not None)]
    rows, moved = "", "stays the same" if before.answer == after.answer else "moves"
    for name, t in (("original", before), ("edited", after)):
        rows += f"<tr><th scope='row'>{name}</th><td>{_words(t)}<br>next: {_likeliest(t.next_tokens[:4])}</td>"
        rows += f"<td><b>{safe_token(t.answer)}</b></td>" + ("" if t.truth is None else f"<td>{t.truth:.3f}</td>")
        rows += "</tr>"
    return f"<p><b>Thought {number:d} edited: the answer {moved}.</b></p>" + _table(titles, rows)


def _likeliest(top: list[tuple[str, float]]) -> str:
    return ", ".join(f"{safe_token(token)} <i>{p:.3f}</i>" for token, p in top)


def _predictions(e: Episode, thoughts: list[Thought]) -> str:
    after = [(f"after thought {k}", t.weight, t.next_tokens) for k, t in enumerate(thoughts, 1)]
    rows = [("without thoughts", e.no_thought_weight, e.base_tokens), *after, ("mixed", None, e.mixed_tokens)]
    body = ""
    for name, weight, top in (row for row in rows if row[2]):
        body += f"<tr><th scope='row'>{name}</th><td>{_likeliest(top[:5])}</td>"
        body += f"<td>{'' if weight is None else f'{weight:.2f}'}</td></tr>"
    titles = ("prediction", "likeliest tokens with their probabilities", "mixing weight")
    return "<details><summary>Next token</summary>" + _table(titles, body) + "</details>" if body else ""


def overview(episodes: Iterable[Episode], limit: int = 50) -> str:
    """Return a table of problems with their outcomes, the first ``limit`` of them."""
    episodes = list(episodes)
    rows = "".join(
        f"<tr><td>{n}</td><td>{safe_text(e.question, 160)}</td>"
        f"<td>{'not known' if e.answer is None else safe_text(e.answer, 40)}</td>"
        f"<td>{safe_text(e.answer_without, 40)}</td><td>{safe_text(e.answer_with, 40)}</td>"
        f"<td>{right_or_wrong(e.answer_with, e.answer)}</td><td>{'' if e.answer is None else _nats(helped(e))}</td></tr>"
        for n, e in enumerate(episodes[:limit], 1)
    )
    titles = ("no.", "question", "truth", "without", "with thoughts", "outcome", "mean utility (nats)")
    return page(_table(titles, rows) + (f"<p>and {len(episodes) - limit} more</p>" if len(episodes) > limit else ""))
