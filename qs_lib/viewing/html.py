"""Episodes as HTML. The same serves the live inspector, its static twin and saved pages.

It reads well without its style, which GitHub drops, and says in words or numbers what it also says in colour.
"""

from collections.abc import Iterable

from ..evaluation.episodes import Episode, Thought
from ..stats import fixed
from .escape import safe_text, safe_token

# of Okabe and Ito's palette, which colour-blind readers tell apart
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
PARTS = ("composite", "semantic", "syntactic", "predictive")
MOST_TOKENS, MOST_THOUGHTS = 256, 64
STYLE = """<style>
.qs-episode { color: var(--jp-ui-font-color1, inherit); font-size: 14px; line-height: 1.45; }
.qs-episode h4, .qs-episode p, .qs-episode b, .qs-episode td { overflow-wrap: anywhere; unicode-bidi: isolate; }
.qs-episode table { border-collapse: collapse; margin: 4px 0; }
.qs-episode th, .qs-episode td { text-align: left; vertical-align: top; padding: 2px 8px; background: none;
  color: inherit; border: 1px solid rgba(128, 128, 128, 0.4); unicode-bidi: isolate; }
.qs-episode .tokens td { text-align: center; font-family: monospace; padding: 1px 3px; white-space: pre; }
.jp-OutputArea:has(.qs-live) .qs-twin { display: none; }
.qs-episode .predictions th, .qs-episode .predictions td, .qs-episode .tokens th { white-space: nowrap; }
.qs-episode .scroll { overflow-x: auto; max-width: 100%; }
.qs-episode .track { display: inline-block; width: 80px; height: 9px; border: 1px solid currentColor; }
.qs-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 24px; }
.qs-pair > div { min-width: 0; }
.qs-episode .bar { display: block; height: 100%; background: BLUE; }
.qs-episode h4 { margin: 10px 0 2px; font-size: 14px; }
.qs-episode p { margin: 2px 0; }
.qs-strip .widget-toggle-button { margin: 1px; padding: 0 5px; height: auto; font-family: monospace; }
.qs-choice .mod-active { outline: 2px solid var(--jp-ui-font-color1, currentColor); outline-offset: -2px; \
font-weight: bold; }
.qs-strip > div { max-height: 168px; overflow-y: auto; padding: 2px; }
</style>""".replace("BLUE", BLUE)


def shade(strength: float) -> str:
    """Return the orange of the palette with an opacity of ``strength`` (0 to 1), for CSS."""
    return f"rgba({int(ORANGE[1:3], 16)},{int(ORANGE[3:5], 16)},{int(ORANGE[5:], 16)},{strength:.2f})"


def helped(episode: Episode) -> float:
    """Return the mean utility of the episode's thoughts (nats), 0 where it is not known. Above 0 they helped."""
    return sum(t.utility or 0.0 for t in episode.thoughts) / max(1, len(episode.thoughts))


def right(episode: Episode) -> bool:
    """Say whether the answer with thoughts is the true one."""
    return episode.answer is not None and episode.answer_with == episode.answer


def wrong(episode: Episode) -> bool:
    """Say whether the truth is known and the answer with thoughts is another."""
    return episode.answer is not None and episode.answer_with != episode.answer


def disagree(episode: Episode) -> bool:
    """Say whether the thoughts, each alone, lead to different next tokens."""
    return len({t.answer for t in episode.thoughts}) > 1


def render(episode: Episode, style: bool = True) -> str:
    """Return one problem: its text, its answers, every thought token by token with its scores, the predictions."""
    thoughts = episode.thoughts[:MOST_THOUGHTS]
    first = {(*t.tokens, t.answer): k for k, t in reversed(list(enumerate(thoughts, 1)))}
    shown = [_thought(k, t, first[(*t.tokens, t.answer)]) for k, t in enumerate(thoughts, 1)]
    if len(episode.thoughts) > len(thoughts):
        shown.append(f"<p>{len(episode.thoughts) - len(thoughts)} more thoughts are not shown.</p>")
    body = _heading(episode) + "".join(shown) + _predictions(episode, thoughts)
    return (STYLE if style else "") + _page(body)


def _page(body: str) -> str:
    return f"<div class='qs-episode tex2jax_ignore mathjax_ignore'>{body}</div>"


def _table(titles: Iterable[str], body: str) -> str:
    """A table of titled columns. The titles are this library's own words."""
    head = "".join(f"<th scope='col'>{t}</th>" for t in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _heading(e: Episode) -> str:
    read = " ".join(safe_token(t) for t in e.tokens[-MOST_TOKENS:])
    named = [f"{n} {safe_text(v)}" for n, v in (("stage", e.stage), ("family", e.family)) if v]
    facts = [f"problem {e.problem}", *named, *([f"difficulty {e.difficulty}"] if e.difficulty else [])]
    heading = f"<h4>{safe_text(e.question)}</h4><p>{', '.join(facts)}</p>"
    heading += f"<details><summary>text read up to token {e.position}</summary><p>{read}</p></details>"
    if not e.thoughts:
        return f"{heading}<p>No thoughts have been drawn here.</p>"
    heading += f"<p>truth: <b>{'not known' if e.answer is None else safe_text(e.answer)}</b></p>"
    heading += f"<p>The thoughts {_effect(helped(e))} on average.</p>" if e.answer is not None else ""
    answers = ""
    for name, given in (("without thoughts", e.answer_without), ("with thoughts", e.answer_with)):
        answers += f"<tr><th scope='row'>{name}</th><td>{safe_text(given) or '(nothing)'}</td>"
        answers += f"<td>{_outcome(given, e.answer)}</td></tr>"
    return heading + _table(("answer", "written", "outcome"), answers)


def _outcome(given: str, truth: str | None) -> str:
    return "truth not known" if truth is None else "right" if given == truth else "wrong"


def _effect(utility: float) -> str:
    effect = "helped" if utility > 0.05 else "hurt" if utility < -0.05 else "made no difference"
    return f"{effect} ({fixed(utility, 2, signed=True)} nats)"


def _thought(number: int, t: Thought, first: int) -> str:
    if first < number:
        return f"<h4>Thought {number}</h4><p>word for word thought {first:d}; mixing weight {t.weight:.2f}</p>"
    shown = list(zip(t.tokens, t.logprobs, strict=False))[:MOST_TOKENS]
    words = "".join(f"<td style='background:{_shade(x)}'>{safe_token(token)}</td>" for token, x in shown)
    numbers = "".join(f"<td>{_nats(x)}</td>" for _, x in shown)
    cut = f"<p>{len(t.tokens) - len(shown)} more tokens are not shown.</p>" if len(t.tokens) > len(shown) else ""
    facts = [f"the thought {_effect(t.utility)}"] if t.utility is not None else []
    facts += [f"leads to <b>{safe_token(t.answer)}</b>", f"mixing weight {t.weight:.2f}"]
    if t.reward or t.advantage:
        facts.append(f"reward {_nats(t.reward)}, advantage {_nats(t.advantage)}")
    return (
        f"<h4>Thought {number}</h4><p>{'; '.join(facts)}</p>"
        f"<div class='scroll' tabindex='0' role='group' aria-label='tokens of thought {number}'>"
        f"<table class='tokens'><tbody><tr><th scope='row'>token</th>{words}</tr>"
        f"<tr><th scope='row'>log-prob</th>{numbers}</tr></tbody></table></div>{cut}{_coherence(t.coherence)}"
    )


def _shade(log_prob: float) -> str:
    return shade(min(0.5, max(0.0, -log_prob) * 0.2))


def _nats(value: float) -> str:
    return fixed(value, 2)


def _coherence(scores: dict[str, float]) -> str:
    rows = ""
    for name in (name for name in PARTS if name in scores):
        rows += f"<tr><th scope='row'>{name}</th><td>{scores[name]:.2f}</td><td>{_bar(scores[name])}</td></tr>"
    return _table(("coherence", "0 to 1", "bar"), rows) if scores else ""


def _bar(share: float) -> str:
    percent = 100 * min(1.0, max(0.0, share))
    return f"<span class='track' aria-hidden='true'><span class='bar' style='width:{percent:.0f}%'></span></span>"


def _predictions(e: Episode, thoughts: list[Thought]) -> str:
    rows = [("without thoughts", e.no_thought_weight, e.base_tokens)]
    rows += [(f"after thought {k}", t.weight, t.next_tokens) for k, t in enumerate(thoughts, 1)]
    rows += [("mixed", None, e.mixed_tokens)]
    body = ""
    for name, weight, top in (row for row in rows if row[2]):
        body += f"<tr><th scope='row'>{name}</th><td>{'' if weight is None else f'{weight:.2f} {_bar(weight)}'}</td>"
        body += "".join(f"<td>{safe_token(token)} {p:.3f}</td>" for token, p in top[:5]) + "</tr>"
    head = (
        "<h4>Next token</h4><div class='scroll' tabindex='0' role='group' aria-label='next token'>"
        "<table class='predictions'><thead><tr><th scope='col'>prediction</th><th scope='col'>mixing weight</th>"
        "<th scope='colgroup' colspan='5'>likeliest tokens with their probabilities</th></tr></thead>"
    )
    return f"{head}<tbody>{body}</tbody></table></div>" if body else ""


def overview(episodes: Iterable[Episode], limit: int = 50) -> str:
    """Return a table of problems with their outcomes, the first ``limit`` of them."""
    episodes = list(episodes)
    rows = "".join(
        f"<tr><td>{n}</td><td>{safe_text(e.question, 160)}</td>"
        f"<td>{'not known' if e.answer is None else safe_text(e.answer, 40)}</td>"
        f"<td>{safe_text(e.answer_without, 40)}</td><td>{safe_text(e.answer_with, 40)}</td>"
        f"<td>{_outcome(e.answer_with, e.answer)}</td><td>{'' if e.answer is None else _nats(helped(e))}</td></tr>"
        for n, e in enumerate(episodes[:limit], 1)
    )
    titles = ("no.", "question", "truth", "without", "with thoughts", "outcome", "mean utility (nats)")
    rest = f"<p>and {len(episodes) - limit} more</p>" if len(episodes) > limit else ""
    return _page(_table(titles, rows) + rest)
