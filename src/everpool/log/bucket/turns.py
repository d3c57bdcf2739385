"""Who of several contending writers swaps next, without a word between them.

Compare-and-swap alone lets one win at a time and wastes the requests of all others; worse, who has
won knows the new tag and needs one request for its next swap, while those who lost need two. So a
writer that has lost lately takes turns: the head tells who wrote the newest entries. Who wrote the
newest may go on for a few swaps, since those cost one request each; then it is the turn of who
has waited longest, and so on. Each waits for about the time that the swaps before its turn take,
looks at the head, and goes; it goes too when the head has not moved for a few swaps' time, for
then nobody wants the turns before it. Order and durability never depend on any of this.
"""

import random
from collections.abc import Sequence

_SHORT_RUN, _LONG_RUN = 4, 8  # how many swaps a writer makes in its turn, and where they are fast
_FAST_SWAP_S = 0.01
_LOOK = 4
_FIRST_SWAP_S = 0.02
_MOST_SWAP_S = 0.25
_CONTENDED_S = 0.5
_PATIENCE_S = 0.05
_NEWEST = 64
_LEARN = 0.2


class Turns:
    """The turns of one writer, as it sees them. Not for several threads at once."""

    def __init__(self, writer: bytes, chance: random.Random) -> None:
        self._writer = writer
        self._chance = chance
        self._swap_s = _FIRST_SWAP_S
        self._learned = False
        self._contended_until = 0.0

    def won(self, took_s: float) -> None:
        """A swap took effect."""
        self._learn(took_s)

    def lost(self, now: float) -> None:
        """Another one was faster."""
        self._contended_until = now + max(_CONTENDED_S, 20 * self._swap_s)

    def watched(self, swaps: int, now: float) -> None:
        """Others made so many swaps while this writer let them go first."""
        if swaps > 0:
            self.lost(now)

    def contended(self, now: float) -> bool:
        """Whether others were at it lately; else nobody waits for anybody."""
        return now < self._contended_until

    def patience_s(self) -> float:
        """How long to wait for a swap's answer before a look at the head."""
        return max(_PATIENCE_S, 10 * self._swap_s)

    def _learn(self, seconds: float) -> None:
        weight = _LEARN if self._learned else 1.0
        self._learned = True
        self._swap_s += weight * (min(seconds, _MOST_SWAP_S) - self._swap_s)

    def stale(self, age_s: float) -> bool:
        """Whether a head of that age is likely to be replaced by now."""
        return age_s > self._swap_s / 2

    def pause_s(self, writers: Sequence[bytes]) -> float:
        """How long to wait until a look at the head; `writers` wrote its entries, newest last.

        Zero: it is this writer's turn. Who finds the head unmoved after the pause may go too, for
        those before it do not want their turn. They look one after the other.
        """
        if not writers:
            return 0.0
        newest = {writer: at for at, writer in enumerate(writers[-_NEWEST:])}
        most = _LONG_RUN if self._swap_s < _FAST_SWAP_S else _SHORT_RUN
        run = 1
        while run < min(most, len(writers)) and writers[-run - 1] == writers[-1]:
            run += 1
        left = most - run
        if writers[-1] == self._writer:
            rank = 0 if left else len(newest) - 1
            swaps = most * rank
        else:
            mine = newest.pop(self._writer, -1)
            rank = sum(at < mine for at in newest.values())
            swaps = left + most * rank
        return min(swaps, _LOOK * (1 + rank)) * self._swap_s * self._chance.uniform(0.9, 1.1)

    def scatter_s(self, losses: int) -> float:
        """How long to wait after a loss: who has lost often waits less."""
        return self._chance.uniform(0, self._swap_s) / max(1, losses)
