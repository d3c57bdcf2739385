"""The benchmark's picture: for every row, each contender's cost as a multiple of the limit's."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everpool.bench.measure import Result, Role, text_of

COLOURS: dict[Role, str] = {"limit": "#9aa5b1", "peer": "#d0b48c", "everpool": "#1f6feb"}
ROLE_WORDS: dict[Role, str] = {
    "limit": "the machine's limit",
    "peer": "others",
    "everpool": "Everpool",
}
INK, FAINT, MISSED = "#24292f", "#7d8590", "#d1242f"
HEADING_LINES = 1.7
INCH_PER_LINE = 0.25
INCH_PER_COLUMN = 7.6


@dataclass(frozen=True)
class _Bar:
    name: str
    role: Role
    ratio: float
    cost: str
    goal: float | None
    missed: bool

    @property
    def label(self) -> str:
        if self.role == "limit":
            return self.cost
        ratio = f"{self.ratio:,.0f}" if self.ratio >= 10 else f"{self.ratio:.2g}"
        return f"{ratio} x   {self.cost}"


def write_plot(path: Path, results: Sequence[Result], machine: dict[str, str]) -> None:
    """Draw one group of bars per row on a logarithmic axis; ImportError without matplotlib.

    Rows that only count are left out: they have a goal, but nothing to be a multiple of.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    groups = [(result, _bars(result)) for result in results if _is_drawn(result)]
    columns = _columns(groups)
    lines = max(_lines(column) for column in columns)
    width, height = INCH_PER_COLUMN * len(columns), 2.0 + lines * INCH_PER_LINE
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(width, height), layout="constrained", squeeze=False
    )
    for place, column in zip(axes[0], columns, strict=True):
        _draw(place, column)
        _dress(place, column, lines)
    _caption(figure, pyplot, machine)
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)


def _is_drawn(result: Result) -> bool:
    return result.style not in ("bytes", "count") and any(result.costs.values())


_Group = tuple[Result, list[_Bar]]


def _lines(groups: Sequence[_Group]) -> float:
    return sum(len(bars) + HEADING_LINES for _, bars in groups)


def _columns(groups: list[_Group]) -> list[list[_Group]]:
    """One column, or two that are as even as can be, in order."""
    if len(groups) < 4:
        return [groups]
    cut = min(range(1, len(groups)), key=lambda at: abs(_lines(groups[:at]) - _lines(groups[at:])))
    return [groups[:cut], groups[cut:]]


def _bars(result: Result) -> list[_Bar]:
    limits = result.with_role("limit")
    names = [name for name, costs in result.costs.items() if costs]
    base = result.median(limits[0] if limits else names[0])
    goals: dict[str, float] = {}
    missed: set[str] = set()
    for goal in result.goals:
        allowed = goal.allowed_cost(result.costs)
        if allowed is not None:
            # The hardest goal is marked; whether all are reached, the table's ratios tell.
            goals[goal.subject] = min(allowed, goals.get(goal.subject, allowed))
        if goal.outcome(result.costs) == "missed":
            missed.add(goal.subject)
    return [
        _Bar(
            name,
            result.roles[name],
            result.median(name) / base,
            text_of(result.median(name), result.style),
            goals[name] / base if name in goals else None,
            name in missed,
        )
        for name in names
    ]


def _draw(axes: Any, groups: Sequence[_Group]) -> None:
    axes.set_xscale("log")
    place = 0.0
    ticks: list[tuple[float, _Bar]] = []
    for result, bars in groups:
        place += HEADING_LINES
        _write(axes, 0, place - 0.95, result.title, INK, in_axes=True)
        for bar in bars:
            _draw_bar(axes, bar, place)
            ticks.append((place, bar))
            place += 1
    axes.set_yticks([place for place, _ in ticks], [bar.name for _, bar in ticks], fontsize=9)
    for tick, (_, bar) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_color(COLOURS["everpool"] if bar.role == "everpool" else INK)


def _draw_bar(axes: Any, bar: _Bar, place: float) -> None:
    colour = COLOURS[bar.role]
    axes.plot([1, bar.ratio], [place] * 2, color=colour, linewidth=6, solid_capstyle="butt")
    axes.plot(bar.ratio, place, "o", color=colour, markersize=7)
    edge = max(bar.ratio, 1.0)
    if bar.goal is not None:
        axes.plot(bar.goal, place, "|", color=MISSED if bar.missed else INK, markersize=14, mew=2.2)
        # The label keeps clear of the goal's mark, unless that is far to the right of it.
        if edge < bar.goal < edge * 20:
            edge = bar.goal
    _write(axes, edge, place, bar.label, INK if bar.role == "everpool" else FAINT)


def _write(axes: Any, x: float, y: float, text: str, colour: str, in_axes: bool = False) -> None:
    axes.annotate(
        text,
        (x, y),
        xycoords=("axes fraction", "data") if in_axes else "data",
        xytext=(4 if in_axes else 9, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5 if in_axes else 8.5,
        fontweight="bold" if in_axes else "normal",
        color=colour,
    )


def _dress(axes: Any, groups: Sequence[_Group], lines: float) -> None:
    bars = [bar for _, bars in groups for bar in bars]
    marks = [mark for bar in bars for mark in (bar.ratio, bar.goal or bar.ratio)]
    axes.set_xlim(min(0.5, *marks) / 1.7, max(10.0, *marks, *(bar.ratio * 12 for bar in bars)))
    axes.set_ylim(lines - 0.2, -0.1)
    axes.axvline(1, color=FAINT, linewidth=1, zorder=0)
    axes.xaxis.set_major_formatter("{x:,g} x")
    axes.tick_params(axis="x", which="both", labelsize=8.5, colors=FAINT)
    axes.tick_params(axis="x", which="minor", length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", color="#eaeef2")
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _caption(figure: Any, pyplot: Any, machine: dict[str, str]) -> None:
    words = [machine.get(key, "") for key in ("processor", "system", "file system")]
    figure.suptitle(
        "Everpool beside the limit and its peers\n", fontsize=15, color=INK, fontweight="bold"
    )
    figure.text(
        0.5,
        1 - 0.52 / figure.get_figheight(),
        "cost of one operation as a multiple of the machine's own limit: left is better  ·  "
        + ", ".join(filter(None, words)),
        ha="center",
        va="center",
        fontsize=9,
        color=FAINT,
    )
    line: Any = pyplot.Line2D
    handles = [
        line([], [], color=colour, linewidth=6, label=ROLE_WORDS[role])
        for role, colour in COLOURS.items()
    ]
    for colour, words in ((INK, "goal, reached"), (MISSED, "goal, missed")):
        handles.append(
            line(
                [], [], color=colour, marker="|", linestyle="", markersize=12, mew=2.2, label=words
            )
        )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
