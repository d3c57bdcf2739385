"""The demo proves what it says, notices when it is not so, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import everpool
from everpool.cli.app import app
from everpool.demo import sources
from everpool.demo.audit import audit
from everpool.demo.storm import Storm
from everpool.demo.teller import ACCOUNTS

EVERPOOL = [sys.executable, "-m", "everpool.cli"]

try:
    sources.read_volumes()
    sources.read_table()
    missing = ""
except (sources.MissingPackageError, ImportError) as error:
    missing = str(error)
needs_data = pytest.mark.skipif(bool(missing), reason=missing)


@needs_data
def test_the_demo_succeeds_and_cleans_up(tmp_path: Path) -> None:
    done = subprocess.run(
        [*EVERPOOL, "demo", "--seconds", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count(" yes ") == 7 and "NO" not in done.stdout
    assert "write + fdatasync" in done.stdout and "Proved:" in done.stdout
    assert not list(tmp_path.iterdir())


@needs_data
def test_keep_leaves_the_pool(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    command = [*EVERPOOL, "demo", "--seconds", "0.5", "--keep", str(keep)]
    subprocess.run(command, capture_output=True, timeout=110, check=True)
    with everpool.open(keep / "pool", create=False) as pool:
        assert pool["scans/t1"].shape == (197, 233, 189)
    again = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert again.returncode == 1 and "exists" in again.stderr


@needs_data
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_files_and_no_processes(tmp_path: Path, number: int) -> None:
    command = [*EVERPOOL, "demo", "--seconds", "60"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as child:
        while not _tellers(tmp_path):
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == b""
    assert not list(tmp_path.iterdir()) and not _tellers(tmp_path)


def _tellers(folder: Path) -> list[str]:
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue  # ended meanwhile
        if b"everpool.demo.teller" in command and str(folder).encode() in command:
            found.append(entry.parent.name)
    return found


@needs_data
def test_the_audit_notices_what_it_is_there_for(tmp_path: Path) -> None:
    with everpool.open(tmp_path / "pool") as pool:
        for volume in sources.read_volumes():
            pool[volume.name] = volume.voxels
            pool[volume.name + "/affine"] = volume.affine
        pool["airports"] = sources.read_table()
        pool.allocate_array(ACCOUNTS, (50,), "int64")[:] = 1000
        with Storm(tmp_path / "pool", count=2, seed=0) as storm:
            storm.rage(0.2, 0.1, lambda: None)
            assert storm.kills >= 2 and storm.acknowledged > 0

            def broken() -> list[int]:
                return [at for at, check in enumerate(audit(pool, storm, 1000)) if not check.held]

            assert broken() == []
            lost = next(name for name in storm.tellers[0].acknowledged)
            entry = pool.pop(lost)
            assert broken() == [0, 1]
            pool[lost] = entry
            pool.array(ACCOUNTS)[3] += 1
            assert broken() == [1, 2]
            pool.array(ACCOUNTS)[3] -= 1
            scan = np.array(pool["scans/4d"])
            scan[5, 5, 5, 0] += 1
            pool["scans/4d"] = scan
            assert broken() == [4]


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 1
    assert done.stdout.startswith("The demo's data") and sources.INSTALL in done.stdout
