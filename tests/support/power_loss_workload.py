"""A process of a power-loss test: opens the pool and lets some actors play their scripts.

Before each step an actor leaves a mark in the disk's log, and after it another one:

    begun ACTOR K                     step K may count from here on
    done ACTOR K [VERSION ID]         step K was acknowledged
    refused ACTOR K KIND              step K failed, and nothing of it may ever be seen
    unknown ACTOR K ID                nobody could say; `outcome` then makes it done or refused
    created, opened, ended            of the pool, by the process
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import everpool
from everpool.replica import flush

from .forgetful import mark
from .power_loss_mutants import apply_mutant
from .power_loss_script import (
    ACCOUNTS,
    BANK,
    OPENING_BALANCE,
    TOTAL,
    Operation,
    Script,
    Step,
    script,
    transfer_text,
)

# A failed step is tried again this often, a little later each time.
TRIES = 400
PAUSE_S = 0.005


class Order(NamedTuple):
    """What one process is to do; JSON on its command line.

    `actors` are played at once by a thread each. `create` makes the pool, the bank and the
    counter first; else they are waited for.
    """

    disk: str
    pool: str
    actors: list[str]
    seed: int
    steps: int
    mix: dict[str, int]
    create: bool = False
    flush_versions: int = 40
    kept_versions: int = 30
    mutant: str = ""


class Actor:
    """One thread's part."""

    def __init__(self, pool: everpool.Pool, disk: str, name: str, part: Script) -> None:
        self._pool = pool
        self._disk = disk
        self._name = name
        self._part = part
        self._handles: dict[str, Any] = {}

    def play(self) -> None:
        at = 0
        while at < len(self._part.steps):
            end = at + 1
            if self._part.steps[at].how == "pipelined":
                while end < len(self._part.steps) and self._part.steps[end].how == "pipelined":
                    end += 1
                self._pipeline(at, end)
            else:
                self._insist(at, self._part.steps[at])
            at = end

    def _mark(self, what: str, at: int, *facts: object) -> None:
        mark(self._disk, " ".join(map(str, (what, self._name, at, *facts))))

    def _insist(self, at: int, step: Step) -> None:
        """Do a step until it is done."""
        for tried in range(TRIES):
            self._mark("begun", at)
            try:
                facts = self._do(step)
            except everpool.UnavailableError as error:
                self._mark("refused", at, error.kind)
                time.sleep(PAUSE_S * min(tried, 20))
            except everpool.CommitUnknownError as error:
                self._mark("unknown", at, error.id)
                state, version = self._settle(str(error.id))
                if state == "committed":
                    self._mark("done", at, version, error.id)
                    return
                self._mark("refused", at, state)
            else:
                self._mark("done", at, *facts)
                return
        raise TimeoutError(f"step {at} of {self._name} did not succeed in {TRIES} tries")

    def _settle(self, id: str) -> tuple[str, int | None]:
        for tried in range(TRIES):
            try:
                found = self._pool.outcome(id)
            except (everpool.UnavailableError, everpool.CommitUnknownError):
                time.sleep(PAUSE_S * min(tried, 20))
            else:
                return found.state, found.version
        raise TimeoutError(f"nobody could settle {id} in {TRIES} tries")

    def _do(self, step: Step) -> tuple[object, ...]:
        if step.how == "flush":
            flush_pool(self._pool)
            return ()
        if step.how == "direct":
            self._direct(step.operations[0])
            return ()
        for _ in range(TRIES):
            try:
                with self._pool.transaction() as tx:
                    for operation in step.operations:
                        self._in_transaction(tx, operation)
                return tx.version, tx.id
            except everpool.ConflictError:
                time.sleep(PAUSE_S / 5)
        raise TimeoutError(f"{self._name} met conflicts only")

    def _pipeline(self, first: int, end: int) -> None:
        left: list[Any] = []
        for at in range(first, end):
            self._mark("begun", at)
            with self._pool.transaction(wait=False) as tx:
                for operation in self._part.steps[at].operations:
                    self._in_transaction(tx, operation)
            left.append(tx)
        for at, tx in zip(range(first, end), left, strict=True):
            self._mark("done", at, tx.version, tx.id)

    def _memory(self, name: str) -> Any:
        found = self._handles.get(name)
        if found is None:
            found = self._handles[name] = self._pool.memory(name)
        return found

    def _direct(self, operation: Operation) -> None:
        name = operation.name
        match operation.kind:
            case "put":
                self._pool[name] = operation.content()
            case "delete":
                self._handles.pop(name, None)
                del self._pool[name]
            case "allocate":
                self._handles[name] = self._pool.allocate(name, operation.size)
            case "write":
                self._memory(name).write(operation.offset, operation.content())
            case "add":
                self._memory(name).fetch_add(operation.offset, operation.amount)
            case "share":
                self._memory(TOTAL).fetch_add(0, operation.amount)
            case _:
                raise AssertionError(operation)

    def _in_transaction(self, tx: Any, operation: Operation) -> None:
        match operation.kind:
            case "put":
                tx[operation.name] = operation.content()
            case "write":
                tx.memory(operation.name).write(operation.offset, operation.content())
            case "move":
                bank = tx.array(BANK)
                source, target = operation.accounts
                bank[source] -= operation.amount
                bank[target] += operation.amount
                tx[operation.name] = transfer_text(operation)
            case _:
                raise AssertionError(operation)


def flush_pool(pool: everpool.Pool) -> None:
    """Flush the pool; and let the kernel write the shared page, as it does now and then."""
    pool.engine().flush()
    descriptor = os.open(pool.path / "shared", os.O_RDWR)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def set_up(disk: str, path: str) -> everpool.Pool:
    """Make the pool, the bank and the counter."""
    pool = everpool.open(path)
    mark(disk, "created")
    with pool.transaction() as tx:
        bank = tx.allocate_array(BANK, ACCOUNTS, "int64")
        bank[:] = np.full(ACCOUNTS, OPENING_BALANCE)
        tx.allocate(TOTAL, 8)
    return pool


def wait_for_pool(path: str) -> everpool.Pool:
    """Open the pool that another process makes."""
    deadline = time.monotonic() + 30
    while not (Path(path) / "everpool.json").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody made {path}")
        time.sleep(0.01)
    pool = everpool.open(path, create=False)
    while TOTAL not in pool:
        time.sleep(0.01)
    return pool


def main() -> None:
    """Play; the order is the only argument. Says "ready" and waits for a line before it begins."""
    order = Order(**json.loads(sys.argv[1]))
    flush.FLUSH_VERSIONS = order.flush_versions
    flush.KEPT_VERSIONS = order.kept_versions
    apply_mutant(order.mutant)
    kinds = tuple(sorted(order.mix.items()))
    parts = [script(actor, order.seed, order.steps, kinds) for actor in order.actors]
    print("ready", flush=True)
    sys.stdin.readline()
    troubles: list[str] = []
    with set_up(order.disk, order.pool) if order.create else wait_for_pool(order.pool) as pool:
        mark(order.disk, "opened")

        def play(actor: Actor) -> None:
            try:
                actor.play()
            except BaseException:
                troubles.append(traceback.format_exc())

        threads = [
            threading.Thread(target=play, args=(Actor(pool, order.disk, name, part),))
            for name, part in zip(order.actors, parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    mark(order.disk, "ended")
    if troubles:
        sys.exit("\n".join(troubles))


if __name__ == "__main__":
    main()
