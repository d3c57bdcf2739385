"""Several processes share a histogram without locks, and one watches them.

python many_processes.py
"""

import multiprocessing
import random

import everpool

POOL = "./histogram-pool"
WORKERS = 3
THROWS = 200


def throw(seed: int) -> None:
    """Throw two dice many times; each throw adds to the shared histogram."""
    dice = random.Random(seed)
    with everpool.open(POOL) as pool:
        histogram = pool.array("histogram")
        for _ in range(THROWS):
            # Atomic, and never in the way of the others.
            histogram.fetch_add(dice.randint(1, 6) + dice.randint(1, 6), 1)
        pool[f"finished/{seed}"] = THROWS


def main() -> None:
    with everpool.open(POOL) as pool:
        pool.clear()
        pool.allocate_array("histogram", (13,), "int64")
        with pool.watch("finished/") as finished:
            context = multiprocessing.get_context("spawn")
            workers = [context.Process(target=throw, args=(seed,)) for seed in range(WORKERS)]
            for worker in workers:
                worker.start()
            for _ in workers:
                print(next(finished).name)
            for worker in workers:
                worker.join()
        histogram = pool.array("histogram")
        for value in range(2, 13):
            print(f"{value:>2} {'#' * (int(histogram[value]) // 4)}")
        assert histogram[:].sum() == WORKERS * THROWS


if __name__ == "__main__":
    main()
