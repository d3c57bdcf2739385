"""What the machine is, in words: figures mean nothing without it."""

import os
import platform
import sqlite3
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from everpool.bench.servers import redis_missing

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


def facts(folder: Path) -> dict[str, str]:
    """Processor, memory, system, file system of `folder`, its flush, and who took part."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{memory_bytes() / 2**30:.0f} GiB, copied at {_copy_gb_per_s():.1f} GB/s",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "file system": file_system(folder),
        "append 512 B + fdatasync": f"{_flush_s(folder) * 1e6:.0f} µs (median of 200)",
        "versions": ", ".join(_versions()),
    }


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, such as `ext4`."""
    best, found = "", "unknown"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    place = str(folder.resolve())
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = before.split()[4]
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, found = mount, after.split()[0]
    return found


def forgets(folder: Path) -> bool:
    """Whether the file system of `folder` lives in RAM, so that flushes cost nothing there."""
    return file_system(folder) in MEMORY_FILE_SYSTEMS


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """The memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _copy_gb_per_s() -> float:
    source = np.ones(1 << 23)
    target = np.empty_like(source)
    spent: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        spent.append(time.perf_counter() - started)
    return source.nbytes / statistics.median(spent[1:]) / 1e9


def _flush_s(folder: Path) -> float:
    path = folder / "flush"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    spent: list[float] = []
    try:
        for _ in range(200):
            started = time.perf_counter()
            os.write(fd, bytes(512))
            os.fdatasync(fd)
            spent.append(time.perf_counter() - started)
    finally:
        os.close(fd)
        path.unlink()
    return statistics.median(spent)


def _versions() -> list[str]:
    found = [f"SQLite {sqlite3.sqlite_version}"]
    for package in ("everpool", "lmdb", "numpy", "ray"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if redis_missing() is None:
        told = subprocess.run(
            ["redis-server", "--version"], capture_output=True, text=True, check=False
        )
        words = [word[2:] for word in told.stdout.split() if word.startswith("v=")]
        found.append(f"Redis {words[0]}" if words else "Redis")
    return found
