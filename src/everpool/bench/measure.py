"""Rounds, medians and goals: the arithmetic of the benchmark.

The speed of a shared machine drifts by tens of per cent within a minute, so two things are
compared only inside one round, in which every contender takes its turn; what is reported is the
median over the rounds. A cost is seconds (or bytes) for one operation: less is better.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["limit", "peer", "everpool"]
Style = Literal["time", "rate", "bandwidth", "bytes", "count"]
Outcome = Literal["reached", "missed", "not measured"]


@dataclass(frozen=True)
class Contender:
    """Something that can do a row's operation; `measure` returns the cost of one, in one round."""

    name: str
    role: Role
    measure: Callable[[], float]


@dataclass(frozen=True)
class Goal:
    """What `subject` is to cost, beside each of `against`, or absolutely when that is empty.

    With `sense` "<=" the subject costs at most `factor` times the other; with ">=" the subject is
    at least `factor` times as fast. An absolute `factor` is in the row's seconds or bytes.
    """

    subject: str
    sense: Literal["<=", ">="]
    factor: float
    against: tuple[str, ...]
    text: str

    def ratios(self, costs: dict[str, list[float]]) -> dict[str, float]:
        """The measured figure beside each contender that took part: the median over the rounds."""
        mine = costs.get(self.subject, [])
        found: dict[str, float] = {}
        for name in self.against:
            pairs = list(zip(mine, costs.get(name, []), strict=False))
            if pairs:
                found[name] = statistics.median(
                    a / b if self.sense == "<=" else b / a for a, b in pairs
                )
        return found

    def measured(self, costs: dict[str, list[float]]) -> float | None:
        """The figure to hold against `factor`: the worst ratio, or the absolute cost."""
        mine = costs.get(self.subject, [])
        if not self.against:
            return statistics.median(mine) if mine else None
        ratios = self.ratios(costs).values()
        if not ratios:
            return None
        return max(ratios) if self.sense == "<=" else min(ratios)

    def outcome(self, costs: dict[str, list[float]]) -> Outcome:
        """Whether the goal was reached in these rounds."""
        value = self.measured(costs)
        if value is None:
            return "not measured"
        kept = value <= self.factor if self.sense == "<=" else value >= self.factor
        return "reached" if kept else "missed"

    def allowed_cost(self, costs: dict[str, list[float]]) -> float | None:
        """The most that the subject may cost, in the row's unit, for the plot's goal marks."""
        if not self.against:
            return self.factor
        others = [statistics.median(costs[name]) for name in self.against if costs.get(name)]
        if not others:
            return None
        return min(others) * self.factor if self.sense == "<=" else min(others) / self.factor


@dataclass
class Result:
    """What one row measured: the costs of every contender, round by round."""

    name: str
    title: str
    style: Style
    roles: dict[str, Role] = field(default_factory=dict[str, Role])
    costs: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    goals: tuple[Goal, ...] = ()
    notes: list[str] = field(default_factory=list[str])

    def median(self, contender: str) -> float:
        """The contender's median cost over the rounds."""
        return statistics.median(self.costs[contender])

    def unrest(self) -> float:
        """How much the limit itself varied: its upper quartile beside its lower one, from 1."""
        spreads = [1.0]
        for name in self.with_role("limit"):
            if len(self.costs[name]) >= 4:
                low, _, high = statistics.quantiles(self.costs[name], n=4)
                spreads.append(high / low)
        return max(spreads)

    def with_role(self, role: Role) -> list[str]:
        """The contenders of a role that took part, in the row's order."""
        return [name for name, its in self.roles.items() if its == role and self.costs.get(name)]


def timed(
    operations: Callable[[int], None],
    target_s: float,
    at_most: int = 1_000_000,
    before: Callable[[], object] | None = None,
) -> Callable[[], float]:
    """A contender's measurement: as many operations at once as fill about `target_s`.

    `operations(count)` performs that many; `before` is called first and not timed. The first
    round also finds the count, which warms caches, connections and files.
    """
    count = 0

    def spent_on(number: int) -> float:
        if before is not None:
            before()
        started = time.perf_counter()
        operations(number)
        return time.perf_counter() - started

    def measure() -> float:
        nonlocal count
        if count == 0:
            count = _count_for(spent_on, target_s, at_most)
        return spent_on(count) / count

    return measure


def _count_for(spent_on: Callable[[int], float], target_s: float, at_most: int) -> int:
    count = 1
    while True:
        spent_s = spent_on(count)
        if spent_s >= target_s / 4 or count >= at_most:
            return max(1, min(at_most, round(count * target_s / max(spent_s, 1e-9))))
        count = min(at_most, count * 4)


def interleave(
    contenders: Sequence[Contender],
    result: Result,
    rounds: int,
    after_round: Callable[[], None],
) -> None:
    """Let every contender take its turn in each of the rounds, and note what it cost.

    One more round comes first and is thrown away. Every other round goes backwards, so that
    nobody always follows the same neighbour, whose files the disk may still be busy with.
    """
    for contender in contenders:
        result.roles[contender.name] = contender.role
        result.costs[contender.name] = []
        contender.measure()
    after_round()
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            result.costs[contender.name].append(contender.measure())
        after_round()


def text_of(cost: float, style: Style) -> str:
    """A cost in words: a time, a rate, GB/s (for a cost per byte), a size or a number."""
    match style:
        case "rate":
            return f"{1 / cost:,.0f}/s" if cost > 1e-6 else f"{1e-6 / cost:.3g} million/s"
        case "bandwidth":
            return f"{1 / cost / 1e9:.2f} GB/s"
        case "bytes":
            return f"{cost / 2**20:,.1f} MiB"
        case "count":
            return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
        case "time":
            for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
                if cost >= scale:
                    return f"{cost / scale:.3g} {unit}"
            return f"{cost / 1e-9:.3g} ns"
