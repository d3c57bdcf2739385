"""What the benchmark shows: a table, a JSON file and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from everpool.bench.measure import Goal, Result, Role, text_of

MARKS = {"reached": "[green]reached[/]", "missed": "[red]missed[/]", "not measured": "[dim]-[/]"}

ROLES: tuple[Role, ...] = ("limit", "peer", "everpool")
GOAL_WIDTHS = (22, 11, 8)
NARROW_GOAL_WIDTHS = (15, 9, 8)
WIDE = 118
UNREST = 1.5


def measured_in_words(goal: Goal, result: Result) -> str:
    """A goal's measured figure: `1.34 x`, or a cost when the goal is absolute."""
    value = goal.measured(result.costs)
    if value is None:
        return "-"
    return f"{value:.3g} x" if goal.against else text_of(value, result.style)


def print_table(console: Console, results: Sequence[Result]) -> None:
    """The table, and below it what the rows had to say.

    A narrow terminal gets the limit, the peers and Everpool in one column, in this order.
    """
    wide = console.width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row", width=26 if wide else 16)
    for title in ("limit", "peers", "Everpool") if wide else ("limit, peers, Everpool",):
        table.add_column(title)
    widths = GOAL_WIDTHS if wide else NARROW_GOAL_WIDTHS
    table.add_column(_goal_line(widths, "goal", "measured", ""), width=sum(widths) + 3)
    for result in results:
        cells = [_cell(result, role, short=wide) for role in ROLES]
        goals = [
            _goal_line(
                widths,
                goal.text,
                measured_in_words(goal, result),
                MARKS[goal.outcome(result.costs)],
            )
            for goal in result.goals
        ]
        table.add_row(
            f"[b]{result.name}[/]\n[dim]{result.title}[/]",
            *(cells if wide else ["\n".join(filter(None, cells))]),
            Group(*goals),
            end_section=True,
        )
    console.print(table)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        console.print(f"  {note}", style="dim", highlight=False)
    restless = [result.name for result in results if result.unrest() > UNREST]
    if restless:
        console.print(
            f"  [yellow]Something else used the machine during {', '.join(restless)}: the limit "
            f"itself varied by more than {UNREST:g} x between rounds. Measure again when it is "
            "quiet.[/]",
            highlight=False,
        )


def _goal_line(widths: tuple[int, ...], *words: str) -> Table:
    """A goal with its figure and outcome beside it, however the goal's words wrap."""
    line = Table.grid(padding=(0, 1))
    for width, side in zip(widths, ("left", "right", "left"), strict=True):
        line.add_column(width=width, justify=side)  # type: ignore[arg-type]
    line.add_row(*words)
    return line


def _cell(result: Result, role: Role, short: bool = True) -> str:
    """The contenders of a role with their costs; `short` where the column says Everpool."""
    lines: list[str] = []
    for name in result.with_role(role):
        cost = text_of(result.median(name), result.style)
        if role == "everpool":
            words = name.removeprefix("Everpool").removeprefix(", ") if short else name
            lines.append(f"[b]{cost}[/] {words}".rstrip())
        else:
            lines.append(f"{cost} {name}")
    return "\n".join(lines)


def markdown(results: Sequence[Result]) -> str:
    """The same table in Markdown, for a page of documentation."""
    lines = [
        "| row | limit | peers | Everpool | goal | measured | |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [
            f"`{result.name}`: {result.title}",
            *(_cell(result, role) for role in ROLES),
            "\n".join(goal.text for goal in result.goals),
            "\n".join(measured_in_words(goal, result) for goal in result.goals),
            "\n".join(goal.outcome(result.costs) for goal in result.goals),
        ]
        text = " | ".join(cell.replace("\n", "<br>") for cell in cells)
        lines.append(f"| {text} |".replace("[b]", "**").replace("[/]", "**"))
    return "\n".join(lines) + "\n"


def as_json(machine: dict[str, str], results: Sequence[Result]) -> dict[str, Any]:
    """Everything measured; costs are seconds (or bytes) for one operation, round by round."""
    return {
        "machine": machine,
        "rows": [
            {
                "name": result.name,
                "title": result.title,
                "style": result.style,
                "contenders": [
                    {
                        "name": name,
                        "role": result.roles[name],
                        "median": result.median(name),
                        "rounds": costs,
                    }
                    for name, costs in result.costs.items()
                ],
                "goals": [
                    {
                        "text": goal.text,
                        "subject": goal.subject,
                        "measured": goal.measured(result.costs),
                        "beside": goal.ratios(result.costs),
                        "outcome": goal.outcome(result.costs),
                    }
                    for goal in result.goals
                ],
                "unrest": result.unrest(),
                "notes": result.notes,
            }
            for result in results
        ],
    }


def write_json(path: Path, machine: dict[str, str], results: Sequence[Result]) -> None:
    """Save `as_json` as a file."""
    path.write_text(json.dumps(as_json(machine, results), indent=2, ensure_ascii=False) + "\n")
