"""The commands about a pool's past, on a pool at a URL and on one at a path."""

import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import everpool
from support.agents import end_agents
from support.cli import out_of, run


@pytest.fixture(params=["bucket", "path"])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("EVERPOOL_CACHE_DIR", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/cloud" if request.param == "bucket" else f"{tmp_path}/pool"
    with everpool.open(url) as pool:
        pool.checkpoint()
        pool["a"] = 1
    yield url
    end_agents(tmp_path)


def test_snapshots_are_made_listed_and_forgotten(url: str) -> None:
    assert out_of("snapshot", url, "first") == "first is version 2\n"
    (line,) = out_of("snapshots", url).splitlines()
    assert line.split()[0] == "2" and line.endswith("first")
    (found,) = [json.loads(line) for line in out_of("snapshots", url, "--json").splitlines()]
    assert found["name"] == "first" and datetime.datetime.fromisoformat(found["time"])
    assert run("snapshot", url, "first").code == 1
    assert "forgot" in out_of("snapshot", url, "first", "--forget")
    assert out_of("snapshots", url) == ""


@pytest.mark.parametrize("way", ["version", "snapshot", "ago", "time"])
def test_recover_brings_back_and_says_how_to_undo_it(url: str, way: str) -> None:
    out_of("snapshot", url, "good")
    moment = datetime.datetime.now().isoformat()
    time.sleep(1.2)
    with everpool.open(url) as pool:
        pool["a"] = 2
        pool["b"] = 1
    to = {"version": "2", "snapshot": "good", "ago": "1 second ago", "time": moment}[way]
    assert "nothing was changed" in out_of("recover", url, "--to", to, "--dry-run")
    said = out_of("recover", url, "--to", to)
    with everpool.open(url) as pool:
        assert dict(pool) == {"a": 1}
    undo = said.splitlines()[-1].partition("everpool ")[2].split()
    out_of(*undo)
    with everpool.open(url) as pool:
        assert dict(pool) == {"a": 2, "b": 1}


def test_a_branch_is_a_pool(url: str, tmp_path: Path) -> None:
    with everpool.open(url) as pool:
        pool["a"] = 2
    there = f"file://{tmp_path}/branch"
    assert "version 1" in out_of("branch", url, there, "--at", "1")
    assert out_of("get", there, "a").strip() == "1"
    assert run("branch", url, there).code == 1


def test_what_is_no_moment_is_refused_with_examples(url: str, tmp_path: Path) -> None:
    for when in ("yesterday-ish", "99999999999 weeks ago", "999999 weeks ago", "9" * 5000):
        done = run("recover", url, "--to", when)
        assert done.code == 2 and "2 hours ago" in done.err
    done = run("branch", url, "x", "--at", "soon")
    assert done.code == 2 and "2 hours ago" in done.err
    done = run("snapshot", url, "2026")
    assert done.code == 2 and "taken for a version" in done.err
    with everpool.open(tmp_path / "at-a-path"):
        done = run("recover", str(tmp_path / "at-a-path"), "--to", "2 hours ago")
    assert done.code == 2 and "keeps no past" in done.err and "pool.checkpoint()" in done.err
    done = run("recover", str(tmp_path / "none"), "--to", "1")
    assert done.code == 1 and "create=True" in done.err


def test_retention_is_shown_and_changed(url: str) -> None:
    assert "for 7 days, and the newest 16,384 for longer\n" in out_of("retain", url)
    assert "30 days" in out_of("retain", url, "--age", "30d")
    assert "for 90 seconds, and the newest one\n" in out_of(
        "retain", url, "--age", "90s", "--versions", "0"
    )
    assert json.loads(out_of("retain", url, "--json")) == {"age_s": 90.0, "versions": 0}
    refused = run("retain", url, "--age", "soon")
    assert refused.code != 0 and "30m, 12h, 7d" in refused.err


@pytest.mark.parametrize("url", ["bucket"], indirect=True)
def test_collect_says_what_goes_and_deletes_it(url: str, tmp_path: Path) -> None:
    out_of("retain", url, "--age", "0s", "--versions", "0")
    for number in range(3):
        with everpool.open(url) as pool:
            pool["large"] = bytes([number]) * 100_000
            pool.checkpoint()
    values = tmp_path / "cloud" / "values"
    assert "not in the newest version" in out_of("collect", url, "--dry-run")
    assert len(list(values.iterdir())) == 3
    assert "deleted" in out_of("collect", url)
    assert len(list(values.iterdir())) == 1
    found = json.loads(out_of("collect", url, "--json"))
    assert found["kept"] > 0 and set(found) == {
        "kept",
        "dead",
        "dead_bytes",
        "deleted",
        "deleted_bytes",
    }
    refused = run("recover", url, "--to", "3")
    assert refused.code != 0 and "was collected" in refused.err
