"""A proxy in front of an HTTP server on this machine, for bad days of the network and the server.

    with proxying(server.port) as proxy:
        ...                     # http://127.0.0.1:{proxy.port}
        proxy.mode = "lose"

The modes, which count for every request that begins:

    pass        as if it were not there
    slow        each request waits for a while
    lose        the request reaches the server, the connection ends before the answer
    lose_puts   the same for PUT only
    drop        the request reaches nobody, and no answer comes
    cut         the connection ends at once
    deny        403, as for wrong credentials
    throttle    503, as for too many requests
"""

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Iterator

_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ERRORS = {
    "deny": (b"403 Forbidden", b"AccessDenied"),
    "throttle": (b"503 Service Unavailable", b"SlowDown"),
}
_SLOW_S = 0.2


class Proxy:
    """A running proxy. `lost` counts the answers that it has lost."""

    def __init__(self, target: int) -> None:
        self.mode = "pass"
        self.lost = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.mode = "cut"
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=_Connection(self, client).serve, daemon=True).start()

    def connect(self) -> socket.socket:
        """Return a connection to the server."""
        return socket.create_connection(("127.0.0.1", self._target), timeout=10)


class _Connection:
    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._losing = False

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._client.recv(1 << 16):
                if data.startswith(_METHODS) and not self._begin(self._proxy.mode, data):
                    break
                if self._server is not None:
                    self._server.sendall(data)
        for link in (self._client, self._server):
            if link is not None:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
                link.close()

    def _begin(self, mode: str, data: bytes) -> bool:
        """A request begins; False when the connection is to end."""
        if mode == "cut":
            return False
        if mode in _ERRORS:
            self._refuse(data, *_ERRORS[mode])
            return False
        if mode == "drop":
            time.sleep(60)
            return False
        if mode == "slow":
            time.sleep(random.uniform(0, 2 * _SLOW_S))
        self._losing = mode == "lose" or (mode == "lose_puts" and data.startswith(b"PUT"))
        if self._server is None:
            self._server = self._proxy.connect()
            self._server.settimeout(None)
            threading.Thread(target=self._answer, args=(self._server,), daemon=True).start()
        return True

    def _answer(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self._losing:
                    self._proxy.lost += 1
                    break
                self._client.sendall(data)
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    def _refuse(self, data: bytes, status: bytes, code: bytes) -> None:
        """Read the whole request, and answer with an error."""
        while b"\r\n\r\n" not in data:
            data += self._client.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        left = (int(length[1]) if length else 0) - len(body)
        while left > 0:
            left -= len(self._client.recv(1 << 16))
        answer = b'<?xml version="1.0"?><Error><Code>' + code + b"</Code></Error>"
        self._client.sendall(
            b"HTTP/1.1 %b\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n%b" % (status, len(answer), answer)
        )


@contextlib.contextmanager
def proxying(target: int) -> Iterator[Proxy]:
    """Run a proxy in front of a port of this machine."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
