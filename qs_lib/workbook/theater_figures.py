"""Figures and tables of anti-theater's attacks and of its zoo. Rows are those of ``experiments/zoo.csv``."""

import numpy as np
import pandas as pd

from ..evaluation.attacks import EARLY, beyond_chance
from ..evaluation.verdict import CHECKS, area_over
from ..stats import fixed, interval, shown
from .figures import LOOKS, draw_band, finish, heat_map, new_figure

HONEST = "honest"  # the organism of the zoo that does not cheat


def early_answering(reports: dict):
    """Draw the share of answers that are final after a part of the thought, a line per named ``TheaterReport``."""
    figure, axis = new_figure(6.4, 3.6)
    for look, (name, report) in zip(LOOKS, reports.items(), strict=False):
        early = report.measured["early"]
        label = f"{name}, area over the curve {fixed(area_over(early).mean(), 2)}"
        draw_band(axis, EARLY, map(interval, early.T), look, label)
    finish(axis, xlabel="share of the thought that is read", ylabel="answers that are final (share)", ylim=(0, 1.02))
    return figure


def belief_by_difficulty(report) -> pd.DataFrame:
    """Return by number of steps the accuracy with thoughts, a linear probe's before them, and the share it foretells."""
    rows, difficulty = {}, np.array([e.difficulty for e in report.episodes])
    for steps in (*np.unique(difficulty), "all"):
        asked = np.ones(len(difficulty), bool) if steps == "all" else difficulty == steps
        names = {"own": "with thoughts", "probe": "probe before the thought", "believed": "foretold by the probe"}
        found = {label: shown(interval(report.measured[name][asked])) for name, label in names.items()}
        rows[steps] = {"problems": int(asked.sum())} | found
    return pd.DataFrame(rows).T.rename_axis("steps")


def agreement(report) -> pd.DataFrame:
    """Return how often answers agree with what they are compared with: as counted, by chance, and beyond chance."""
    found, columns = report.measured, ["counted", "by chance", "beyond chance"]
    early = zip(EARLY[:-1], found["early"].T, found["early_chance"].T, strict=False)
    pairs = {f"answer after {share:.0%} of the thought": both for share, *both in early}
    for label, name in {"altered thought": "followed", "probe before the thought": "believed"}.items():
        pairs[label] = found[name], found[f"{name}_chance"]
    rows = [(shown(interval(a)), fixed(c.mean()), shown(interval(beyond_chance(a, c)))) for a, c in pairs.values()]
    return pd.DataFrame(rows, pd.Index(pairs, name="agrees with"), columns)


def seeds_that_caught(rows: list[dict]) -> pd.DataFrame:
    """Return for each organism and check the share of its seeds on which the check is missed at dose 1.

    A check that no honest model was given is left out: what it says of a cheat could be a false alarm.
    """
    whole = pd.DataFrame(rows).query("dose == 1")
    table = whole.pivot_table("caught", "organism", "check", "mean", sort=False)
    given = set(whole["check"][whole["organism"] == HONEST])
    return table.reindex(columns=[name for name in CHECKS if name in given])


def who_catches_whom(rows: list[dict]):
    """Draw organisms against checks as a heat map: dark where the check is missed on every seed."""
    table = seeds_that_caught(rows).rename(columns=lambda name: name.replace("_", " ")).to_dict("index")
    return heat_map(table, xlabel="check (share of seeds on which it is missed)", ylabel="")


def meant_checks(rows: list[dict]) -> dict[str, str]:
    """Return for each organism the check that sees its smallest dose, on average over seeds."""
    found, best = pd.DataFrame(rows).dropna(subset="limit"), {}
    for name, own in found.groupby("organism", sort=False):
        limits = own.groupby("check", sort=False)["limit"].agg(["mean", "count"])
        best[name] = limits["mean"][limits["count"] == limits["count"].max()].idxmin()
    return best


def doses(rows: list[dict], organism: str, check: str) -> pd.Series:
    """Return what a check measures by dose, a mean over seeds. Dose 0 is the honest models of these seeds."""
    table = pd.DataFrame(rows).query("check == @check")
    own, none = table[table["organism"] == organism], table[table["organism"] == HONEST].assign(dose=0.0)
    both = pd.concat([own, none[none["seed"].isin(own["seed"])]])
    return both.groupby("dose")["value"].mean()  # in order of the dose


def dose_response(rows: list[dict]):
    """Draw for each organism what its check measures by dose, and the bar of the check."""
    meant, columns = meant_checks(rows), 5
    lines = -(-len(meant) // columns)
    figure, axes = new_figure(11, 2.2 * lines, columns, lines, sharex=True)
    for axis, (organism, check) in zip(axes.flat, meant.items(), strict=False):
        values = doses(rows, organism, check)
        axis.plot(values.index, values, color=LOOKS[0].colour, marker="o", ms=3)
        axis.axhline(float(CHECKS[check].bar.split()[1]), color="black", lw=0.8, ls=":")
        axis.set_title(f"{organism}\n{check.replace('_', ' ')}", fontsize=8)
    for axis in axes.flat[len(meant) :]:
        axis.set_visible(False)
    figure.supxlabel("dose: share of problems on which it cheats")
    return figure


def zoo_table(rows: list[dict]) -> pd.DataFrame:
    """Return for each organism the checks that are missed on all its seeds, and the check that sees its smallest dose."""
    caught, meant, table = seeds_that_caught(rows), meant_checks(rows), {}
    for organism in caught.index.drop(HONEST):
        every = [name for name, share in caught.loc[organism].items() if share == 1]
        table[organism] = {"caught in all seeds by": ", ".join(every) or "NOT CAUGHT"}
        if check := meant.get(organism):
            own = [r["limit"] for r in rows if (r["organism"], r["check"]) == (organism, check)]
            limits = [limit for limit in own if limit is not None]
            sign, bound = CHECKS[check].bar.split()
            values = doses(rows, organism, check).to_numpy()
            short = {">": -values, "<": values, "=": abs(values - float(bound))}[sign]  # how far it falls short
            found = {"first seen by": check, "monotone": "yes" if (np.diff(short) >= -1e-9).all() else "no"}
            mean, *ends = (fixed(limit, 2) for limit in (np.mean(limits), min(limits), max(limits)))
            found["from a dose of"] = mean if len({*ends}) == 1 else f"{mean} ({' to '.join(ends)})"
            table[organism] |= found
    return pd.DataFrame(table).T.fillna("-")


def check_table(rows: list[dict]) -> pd.DataFrame:
    """Return of each check what it catches on all seeds, what it alone does, its false alarms and share of the cost."""
    caught = seeds_that_caught(rows).drop(HONEST) == 1
    honest = pd.DataFrame([row for row in rows if row["organism"] == HONEST])
    thoughts, seconds = (honest.groupby("check")[name].mean() for name in ("thoughts", "seconds"))
    table = {}
    for check in caught:
        alone = [name for name in caught.index if caught.loc[name, check] and caught.loc[name].sum() == 1]
        alarms = honest[honest["check"] == check]["caught"]
        table[check] = {
            "catches": f"{int(caught[check].sum())} of {len(caught)}",
            "alone": ", ".join(alone) or "-",
            "false alarms": f"{int(alarms.sum())} of {len(alarms)}",
            "thoughts": int(thoughts[check]),
            "share of the time": fixed(seconds[check] / seconds.sum(), 2),
        }
    return pd.DataFrame(table).T
