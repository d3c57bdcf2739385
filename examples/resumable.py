"""A long computation that can be killed at any moment and goes on where it stopped.

    python resumable.py       # start it, kill it (Ctrl-C, kill -9, pull the plug), start it again

The result and how far it has come change in one transaction, so they never disagree.
"""

import numpy as np

import everpool

STEPS = 200
CELLS = 1000


def step(heat: np.ndarray) -> np.ndarray:
    """Let heat flow to the neighbours for a moment."""
    return heat + 0.1 * (np.roll(heat, 1) - 2 * heat + np.roll(heat, -1))


def main() -> None:
    with everpool.open("./resumable-pool") as pool:
        if "heat" not in pool:
            with pool.transaction() as tx:
                tx.allocate_array("heat", (CELLS,), "float64")[CELLS // 2] = 1.0
                tx["steps done"] = 0
        start = pool["steps done"]
        print(f"starting at step {start} of {STEPS}")
        for number in range(start, STEPS):
            with pool.transaction() as tx:
                heat = tx.array("heat")
                heat[:] = step(heat[:])
                tx["steps done"] = number + 1
        total = np.asarray(pool.array("heat")).sum()
        print(f"done; the heat adds up to {total:.6f}")


if __name__ == "__main__":
    main()
