"""A process of a power-loss test: opens the pool and lets some actors play their scripts.

Before each step an actor leaves a mark in the disk's log, and after it another one:

    begun ACTOR K                     step K may count from here on
    done ACTOR K [VERSION ID]         step K was acknowledged
    refused ACTOR K KIND              step K failed, and nothing of it may ever be seen
    unknown ACTOR K ID                nobody could say; `outcome` then makes it done or refused

The process itself leaves these:

    created                           the pool was made
    unopened KIND                     it could not be opened; it is tried again
    flushed                           a flush of memory succeeded
    opened                            it is open, with the bank and the counter
    saw ACTOR DIGEST                  what an actor's names held when it was opened
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
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
    State,
    Step,
    digest,
    digest_of_state,
    script,
    transfer_text,
)

# What fails is tried again this often, a little later each time.
TRIES = 600
PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.1
POOL = "pool"


class Order(msgspec.Struct, frozen=True):
    """What one process is to do on the disk that is mounted at `disk`.

    `actors` are played at once by a thread each. `create` makes the pool, the bank and the
    counter first; else they are waited for. A `late` one begins when it is told to. `watched` are
    actors of an earlier run, of whom it tells what it saw. With `past`, a flush is a checkpoint.
    """

    disk: str
    actors: tuple[str, ...]
    seed: int
    steps: int
    mix: Mapping[str, int]
    create: bool = False
    late: bool = False
    watched: tuple[str, ...] = ()
    flush_versions: int = 40
    kept_versions: int = 30
    past: bool = False
    mutant: str = ""
    boot: str = str(uuid.UUID(int=1))

    @property
    def pool(self) -> str:
        """The pool's path."""
        return f"{self.disk}/{POOL}"

    def script(self, actor: str) -> Script:
        """What that actor is to do."""
        return script(actor, self.seed, self.steps, tuple(sorted(self.mix.items())))


def work(link: Connection, order: Order) -> None:
    """A child's part: gets ready, says so, waits for a word, and plays."""
    os.environ["EVERPOOL_BOOT_ID"] = order.boot
    flush.FLUSH_VERSIONS = order.flush_versions
    flush.KEPT_VERSIONS = order.kept_versions
    apply_mutant(order.mutant)
    parts = [(actor, order.script(actor)) for actor in order.actors]
    link.send("ready")
    link.recv()
    troubles: list[str] = []
    with set_up(order) if order.create else wait_for_pool(order) as pool:
        mark(order.disk, "opened")
        for actor in order.watched:
            mark(order.disk, f"saw {actor} {digest_of_state(look_at(pool, actor))}")

        def play(actor: Actor) -> None:
            try:
                actor.play()
            except BaseException:
                troubles.append(traceback.format_exc())

        threads = [
            threading.Thread(
                target=play, args=(Actor(pool, order.disk, name, part, past=order.past),)
            )
            for name, part in parts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if troubles:
        raise AssertionError("\n".join(troubles))


def set_up(order: Order) -> everpool.Pool:
    """Make the pool, the bank and the counter."""
    pool = insist_open(order, create=True)
    mark(order.disk, "created")
    with pool.transaction() as tx:
        bank = tx.allocate_array(BANK, ACCOUNTS, "int64")
        bank[:] = np.full(ACCOUNTS, OPENING_BALANCE)
        tx.allocate(TOTAL, 8)
    return pool


def wait_for_pool(order: Order) -> everpool.Pool:
    """Open the pool that another process makes, or made."""
    for tried in range(TRIES):
        if (Path(order.pool) / "everpool.json").exists():
            break
        pause(tried)
    pool = insist_open(order, create=False)
    for tried in range(TRIES):
        if TOTAL in pool:
            return pool
        pause(tried)
    raise TimeoutError("nobody made the bank and the counter")


def insist_open(order: Order, *, create: bool) -> everpool.Pool:
    """Open the pool, however often the disk fails."""
    for tried in range(TRIES):
        try:
            return everpool.open(order.pool, create=create)
        except everpool.UnavailableError as error:
            mark(order.disk, f"unopened {error.kind}")
            pause(tried)
    raise TimeoutError(f"{order.pool} could not be opened in {TRIES} tries")


def pause(tried: int) -> None:
    time.sleep(min(PAUSE_S * (1 + tried), LONGEST_PAUSE_S))


def look_at(pool: everpool.Pool, actor: str) -> State:
    """What an actor's names hold."""
    found: State = {}
    for name in pool.names(f"{actor}/"):
        held = pool[name]
        if isinstance(held, everpool.Memory):
            found[name] = digest("memory", held.read(0, held.size))
        else:
            found[name] = digest("value", held)
    return found


def write_shared_page(pool: everpool.Pool) -> None:
    """Do what the kernel does by itself now and then."""
    with contextlib.suppress(OSError):
        descriptor = os.open(pool.path / "shared", os.O_RDWR)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


class Actor:
    """One thread's part."""

    def __init__(
        self, pool: everpool.Pool, disk: str, name: str, part: Script, *, past: bool
    ) -> None:
        self._pool = pool
        self._disk = disk
        self._name = name
        self._steps = part.steps
        self._past = past
        self._handles: dict[str, Any] = {}

    def play(self) -> None:
        """Play all steps, in order."""
        at = 0
        while at < len(self._steps):
            end = at + 1
            if self._steps[at].how == "pipelined":
                while end < len(self._steps) and self._steps[end].how == "pipelined":
                    end += 1
                self._pipeline(at, end)
            else:
                self._insist(at, self._steps[at])
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
                pause(tried)
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
                pause(tried)
            else:
                return found.state, found.version
        raise TimeoutError(f"nobody could settle {id} in {TRIES} tries")

    def _do(self, step: Step) -> tuple[object, ...]:
        if step.how == "flush":
            if self._past:
                self._pool.checkpoint()
            else:
                self._pool.engine().flush()
            mark(self._disk, "flushed")
            write_shared_page(self._pool)
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
                for operation in self._steps[at].operations:
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
                del self._pool[name]
                self._handles.pop(name, None)
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
