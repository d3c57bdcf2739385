"""Redis, started and stopped by the benchmark, and Ray when it is installed.

Redis runs on a free loopback port with its append-only file, flushed at every write, in a folder
of the benchmark, so that it pays for the same disk as everybody else. The client here is a raw
socket that formats a request and parses an answer and does nothing more: no client library gives
Redis less overhead from Python.
"""

import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START_LIMIT_S = 15.0


class RedisClient:
    """One connection that speaks just enough of the Redis protocol."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb", buffering=1 << 16)

    def send(self, *words: bytes) -> None:
        """Send one command and do not wait for its answer."""
        self._socket.sendall(request(*words))

    def send_raw(self, requests: bytes) -> None:
        """Send commands that `request` has formatted before."""
        self._socket.sendall(requests)

    def answer(self) -> Any:
        """The next answer: bytes, int, a list of answers, or None; RuntimeError for an error."""
        line = self._answers.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            length = int(rest)
            return self._answers.read(length + 2)[:-2] if length >= 0 else None
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        raise RuntimeError(f"Redis answered {line!r}")

    def call(self, *words: bytes) -> Any:
        """Send one command and return its answer."""
        self._socket.sendall(request(*words))
        return self.answer()

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


def request(*words: bytes) -> bytes:
    """A command as Redis wants it on the wire."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        parts.append(b"$%d\r\n%b\r\n" % (len(word), word))
    return b"".join(parts)


class RedisServer:
    """A redis-server process of the benchmark's own; `close` ends it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.port = free_port()
        self._log = folder / "log"
        command = [
            "redis-server",
            *("--port", str(self.port)),
            *("--bind", "127.0.0.1"),
            *("--dir", str(folder)),
            *("--logfile", str(self._log)),
            *("--appendonly", "yes"),
            *("--appendfsync", "always"),
            *("--save", ""),
            # A rewrite of the file in the background would disturb the neighbours' rounds.
            *("--auto-aof-rewrite-percentage", "0"),
        ]
        self._process = subprocess.Popen(
            dying_with_us(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C reaches the benchmark alone, which then ends its servers in order.
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                client = RedisClient(self.port)
                client.call(b"PING")
                client.close()
                return
            except (OSError, RuntimeError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self._log.read_text(errors="replace") if self._log.exists() else ""
                    raise RuntimeError(f"redis-server did not start:\n{log[-2000:]}") from None
                time.sleep(0.02)

    def client(self) -> RedisClient:
        """A new connection."""
        return RedisClient(self.port)

    def close(self) -> None:
        """End the server; what it stored goes with the benchmark's folder."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dying_with_us(command: list[str]) -> list[str]:
    """The command so that the kernel ends it should the benchmark be killed outright."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command


def redis_missing() -> str | None:
    """Why Redis cannot take part, or None when it can."""
    if shutil.which("redis-server"):
        return None
    return "Redis did not take part: redis-server is not installed (try --install-peers)."


def install_redis() -> str:
    """Install redis-server by apt-get when that is possible; says in words what came of it."""
    if shutil.which("redis-server"):
        return "redis-server is installed already."
    if not shutil.which("apt-get"):
        return "redis-server was not installed: this system has no apt-get. Install it yourself."
    if os.geteuid() != 0:
        return (
            "redis-server was not installed: that takes root. "
            "Run `sudo apt-get install redis-server`, then the benchmark again."
        )
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "redis-server"]):
        done = subprocess.run(
            ["apt-get", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 and arguments[0] == "install":
            return f"redis-server was not installed: apt-get said {done.stderr.strip()[-500:]!r}"
    stop = ["systemctl", "disable", "--now", "redis-server"]
    if shutil.which("systemctl"):
        # The package starts a server of its own at boot; the benchmark wants only the program.
        subprocess.run(stop, capture_output=True, check=False)
    return "redis-server was installed by apt-get; its system service is switched off."


class RaySession:
    """A Ray of the benchmark's own on this machine; `close` ends it and removes its files."""

    def __init__(self, store_bytes: int) -> None:
        self._ray: Any = importlib.import_module("ray")
        # Ray puts Unix sockets below this folder, whose paths must stay short.
        self._folder = tempfile.mkdtemp(prefix="evb-", dir="/tmp")
        self._ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=store_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=self._folder,
        )

    def put(self, value: object) -> Any:
        return self._ray.put(value)

    def get(self, reference: Any) -> Any:
        return self._ray.get(reference)

    def close(self) -> None:
        self._ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def ray_missing() -> str | None:
    """Why Ray cannot take part, or None when it can."""
    try:
        importlib.import_module("ray")
    except ImportError:
        return f"Ray did not take part: `{sys.executable} -m pip install ray` would let it."
    return None
