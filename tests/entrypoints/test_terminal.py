"""Standard streams that are closed, or whose reader goes away, in processes of their own (without workers)."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tetrion.engine.hardware.standard_streams import hold_standard_descriptors

FORKS = """
import json, os, sys, traceback
from tests.entrypoints.conftest import FakeFactory
from tetrion.entrypoints import cli
from tetrion.engine.hardware.event_loop import new_event_loop  # with uvloop

def child(name, arguments, replaced):
    # replaced: descriptor -> None (closed), or a path to open there
    if (pid := os.fork()) == 0:
        code = 99
        try:
            for fd, path in replaced.items():
                os.close(fd)
                if path == "gone":
                    reader, writer = os.pipe()
                    os.close(reader)
                    if writer != fd:
                        os.dup2(writer, fd)
                        os.close(writer)
                elif path:
                    opened = os.open(path, os.O_RDWR)
                    assert opened == fd
            for number, stream in enumerate(("stdin", "stdout", "stderr")):
                if number in replaced and replaced[number] is None:
                    setattr(sys, stream, None)  # as Python does at its start
            run = cli.run
            cli.run = lambda given: run(given, FakeFactory())
            sys.argv[1:] = arguments
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
            streams = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
        except BaseException:
            streams = [traceback.format_exc()]
        os.write(report, (json.dumps([name, code, streams]) + "\\n").encode())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)
    os.waitpid(pid, 0)

report = os.dup(1)
for name, arguments, replaced in json.loads(sys.stdin.readline()):
    child(name, arguments, {int(fd): path for fd, path in replaced.items()})
"""


Ends = tuple[dict[str, tuple[int, list[str]]], str, Path]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    """By name: exit code and what the descriptors 0 to 2 are in the end; what was on stderr; the folder of pictures."""
    out = tmp_path_factory.mktemp("streams")
    (out / "requests.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    generate = ["generate", "a", "b", "--devices", "cpu:1"]
    runs: list[tuple[str, list[str], dict[int, str | None]]] = []
    for number in range(1, 4):
        for closed in itertools.combinations(range(3), number):
            name = f"closed {closed}"
            runs.append((name, [*generate, "--output", str(out / name)], dict.fromkeys(closed)))
    batch = ["batch", str(out / "requests.jsonl"), "--output"]
    runs += [
        ("generate, closed, JSON", [*generate, "--json", "--output", str(out / "j")], {1: None}),
        ("batch, closed", [*batch, str(out / "b")], {0: None, 1: None, 2: None}),
        ("bad input, closed", ["generate", "--devices", "cpu:1"], {0: None, 1: None, 2: None}),
        ("reader gone", [*generate, "--json", "--output", str(out / "reader gone")], {1: "gone"}),
        ("reader of both gone", [*generate, "--output", str(out / "both gone")], {1: "gone", 2: "gone"}),
        ("reader of stderr gone", [*generate, "--output", str(out / "stderr gone")], {2: "gone"}),
        ("batch, reader gone", [*batch, str(out / "b2")], {1: "gone"}),
        ("batch, reader of stderr gone", [*batch, str(out / "b3")], {2: "gone"}),
        ("help, reader gone", ["--help"], {1: "gone"}),
        ("usage, reader gone", ["generate", "--nonsense"], {2: "gone"}),
        ("full", [*generate, "--output", str(out / "full")], {1: "/dev/full"}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(runs) + "\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: (code, streams) for name, code, streams in lines}, done.stderr, out


def test_closed_streams_are_as_dev_null(ends: Ends) -> None:
    by_name, _, out = ends
    closed = {name: end for name, end in by_name.items() if name.startswith("closed")}
    assert len(closed) == 7
    for name, (code, streams) in closed.items():
        assert code == 0, (name, streams)
        assert len(list((out / name).glob("*.png"))) == 3
        assert all(streams[fd] == "/dev/null" for fd in range(3) if str(fd) in name)
    assert by_name["generate, closed, JSON"][0] == 0
    assert by_name["batch, closed"][0] == 1 and by_name["bad input, closed"][0] == 2


def test_who_has_no_reader_ends_as_other_tools_do_and_says_nothing(ends: Ends) -> None:
    by_name, said, out = ends
    for name in ("reader gone", "reader of both gone", "batch, reader gone", "help, reader gone", "usage, reader gone"):
        assert by_name[name][0] == 141, (name, by_name[name])
    assert len(list((out / "reader gone").glob("*.png"))) == len(list((out / "both gone").glob("*.png"))) == 3
    assert "Broken pipe" not in said and "Traceback" not in said and "Exception ignored" not in said


def test_nobody_need_watch_the_progress(ends: Ends) -> None:
    by_name, _, out = ends
    assert by_name["reader of stderr gone"][0] == 0 and len(list((out / "stderr gone").glob("*.png"))) == 3
    assert by_name["batch, reader of stderr gone"][0] == 1 and len(list((out / "b3").glob("*.png"))) == 1


def test_a_full_disk_is_said_once(ends: Ends) -> None:
    by_name, said, _ = ends
    assert by_name["full"][0] == 1 and said.count("No space left on device") == 1


def test_descriptors_of_standard_streams_are_never_given_to_something_else() -> None:
    """Also in a process that is not the console command's: for the embedded engine."""
    if (pid := os.fork()) == 0:
        for fd in range(3):
            os.close(fd)
        hold_standard_descriptors()
        held = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
        os._exit(0 if held == ["/dev/null"] * 3 and os.open("/dev/zero", os.O_RDONLY) > 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
