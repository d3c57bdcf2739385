"""How the tests reach an engine's pool: the whole seam between the suites and an engine."""

from collections.abc import Callable
from typing import Any


class Harness:
    """One pool for one test, and the clients that the test opened on it.

    `connect` opens another client of the pool and creates the pool the first time. `kill`, where
    an engine's clients can die, ends the given client without warning; the default closes it.
    `remove` is called once, after the last client is gone.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        kill: Callable[[Any], None] | None = None,
        remove: Callable[[], None] | None = None,
    ) -> None:
        self._connect = connect
        self._kill = kill
        self._remove = remove
        self._clients: list[Any] = []

    def open(self) -> Any:
        """Return another client of the pool."""
        client = self._connect()
        self._clients.append(client)
        return client

    def reopen(self) -> Any:
        """Close every client and return a new one."""
        self._close_clients()
        return self.open()

    def kill(self, client: Any) -> None:
        """End one client without warning."""
        self._clients = [known for known in self._clients if known is not client]
        if self._kill is None:
            client.close()
        else:
            self._kill(client)

    def crash(self) -> None:
        """End every client without warning."""
        for client in list(self._clients):
            self.kill(client)

    def close(self) -> None:
        """Close every client and remove the pool."""
        self._close_clients()
        if self._remove is not None:
            self._remove()

    def _close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()
