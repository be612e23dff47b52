"""A run of pieces survives kills at any time, keeps to its deadline, and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import pieces
from benchmarks.harness.pieces import CUT, FAILED, OVERRAN, PASSED, Archive, Piece, unpacked

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, time
from pathlib import Path
from benchmarks.harness.pieces import Piece, run, unpacked

plan = json.loads(sys.argv[2])
with unpacked(Path(sys.argv[1])) as archive:
    made = [
        Piece(stage, name, ("/bin/sh", "-c", command.replace("WORK", str(archive.folder))))
        for stage, name, command in plan
    ]
    done = run(made, archive, deadline=time.monotonic() + 300)
sys.exit(0 if done else 75)
"""
#: Two rows, each written whole; between them half a row, and a wait where a kill comes.
ROWS = """
mkdir -p WORK/rows
for row in 1 2; do
  test -f WORK/rows/$row.json && continue
  echo row $row >> {log}
  echo half > WORK/rows/$row.json.begun
  if test $row = 2 -a ! -f {go}; then echo $$ > {pid}; sleep 600; fi
  echo whole > WORK/rows/$row.json.begun
  mv WORK/rows/$row.json.begun WORK/rows/$row.json
done
"""


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def contents(archive: Path) -> dict[str, str]:
    with zipfile.ZipFile(archive) as packed:
        return {name: packed.read(name).decode() for name in packed.namelist()}


def start(archive: Path, plan: list[tuple[str, str, str]]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(archive), json.dumps(plan)]
    return subprocess.Popen(command, env=environment)


def shell(stage: str, name: str, command: str, **options: Any) -> Piece:
    return Piece(stage, name, ("/bin/sh", "-c", command), **options)


def run(archive: Archive, *made: Piece, seconds: float = 300, jobs: int = 1) -> bool:
    return pieces.run(made, archive, deadline=time.monotonic() + seconds, jobs=jobs)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@needs_proc
@pytest.mark.parametrize("killed", ["a", "b", "c"])
def test_a_run_that_was_killed_in_any_piece_goes_on_with_that_piece(killed, tmp_path):
    log, go, pid = (tmp_path / name for name in ("log", "go", "pid"))
    waits = f"if test ! -f {go}; then echo $$ > {pid}; sleep 600; fi"
    plan = [
        (f"stage-{name}", name, f"echo {name} >> {log}; {waits if name == killed else ':'}")
        for name in "abc"
    ]
    archive = tmp_path / "out" / "evidence.zip"
    process = start(archive, plan)
    wait_for(lambda: pid.is_file() and pid.read_text().strip(), f"piece {killed}")
    process.kill()
    process.wait()
    child = int(pid.read_text())
    wait_for(lambda: not alive(child), "the death of the piece")
    before = "abc"[: "abc".index(killed)]
    if before:
        done = [name for name in contents(archive) if name.endswith(".json")]
        assert sorted(done) == [f"stage-{name}/{name}.json" for name in before]
    go.touch()
    assert start(archive, plan).wait() == 0
    assert log.read_text().split() == [*before, killed, *"abc"["abc".index(killed) :]]
    found = contents(archive)
    for name in "abc":
        assert json.loads(found[f"stage-{name}/{name}.json"])["ended"] == PASSED
    assert [path.name for path in archive.parent.iterdir()] == ["evidence.zip"]


@needs_proc
def test_a_kill_costs_the_running_row_and_half_a_row_is_not_believed(tmp_path):
    log, go, pid = (tmp_path / name for name in ("log", "go", "pid"))
    plan = [("rows", "rows", ROWS.format(log=log, go=go, pid=pid))]
    archive = tmp_path / "out" / "evidence.zip"
    process = start(archive, plan)
    wait_for(lambda: archive.is_file() and "rows/1.json" in contents(archive), "the first row")
    wait_for(lambda: pid.is_file() and pid.read_text().strip(), "the second row")
    process.kill()
    process.wait()
    rows = {name for name in contents(archive) if name.endswith((".json", ".begun"))}
    assert rows == {"rows/1.json"}
    go.touch()
    assert start(archive, plan).wait() == 0
    assert log.read_text().splitlines() == ["row 1", "row 2", "row 2"]
    found = contents(archive)
    assert found["rows/1.json"] == found["rows/2.json"] == "whole\n"


def test_a_deadline_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(0.3); from benchmarks.harness import pieces; " \
        "print(time.monotonic() - pieces.process_start())"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert 0.3 <= float(done.stdout) < 200


def test_half_an_archive_is_not_believed(tmp_path):
    path = tmp_path / "evidence.zip"
    with unpacked(path) as archive:
        assert run(archive, shell("one", "a", "exit 0"))
    (tmp_path / "evidence.zip.begun").write_bytes(path.read_bytes()[:50])
    with unpacked(path) as archive:
        assert archive.done(shell("one", "a", "exit 0"))
        archive.pack()
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.zip"]


@needs_proc
def test_a_piece_over_its_limit_is_killed_with_all_it_started_and_not_tried_again(tmp_path):
    pid = tmp_path / "pid"
    slow = shell("one", "slow", f"sleep 600 & echo $! > {pid}; echo said; wait", limit=2)
    path = tmp_path / "out" / "evidence.zip"
    with unpacked(path) as archive:
        begin = time.monotonic()
        assert run(archive, slow, shell("one", "after", "exit 3"))
        assert time.monotonic() - begin < 200
        outcomes = {p: archive.outcome(shell("one", p, "")) for p in ("slow", "after")}
    assert {name: o["ended"] for name, o in outcomes.items()} == {"slow": OVERRAN, "after": FAILED}
    assert outcomes["after"]["status"] == 3
    wait_for(lambda: not alive(int(pid.read_text())), "the death of the grandchild")
    assert "said" in contents(path)["one/slow.log"]
    pid.unlink()
    with unpacked(path) as archive:
        assert run(archive, slow)
    assert not pid.exists()


def test_what_the_deadline_cuts_is_run_again(tmp_path):
    path = tmp_path / "evidence.zip"
    made = [
        shell("one", "a", "exit 0"),
        shell("one", "b", "sleep 600"),
        shell("one", "c", "exit 0"),
    ]
    with unpacked(path) as archive:
        assert run(archive, made[0])
        begin = time.monotonic()
        assert not run(archive, *made, seconds=1)
        assert time.monotonic() - begin < 200
        assert archive.outcome(made[1])["ended"] == CUT
        assert archive.outcome(made[2]) is None
        table = pieces.summary(made, archive)
        assert "| one | b | cut |" in table
        assert "| one | c | not run | | |" in table
    made[1] = shell("one", "b", "exit 0")
    with unpacked(tmp_path / "elsewhere.zip", path) as archive:  # on another machine
        assert archive.done(made[0])
        assert not archive.done(made[1])
        assert run(archive, *made)
    assert json.loads(contents(tmp_path / "elsewhere.zip")["one/b.json"])["ended"] == PASSED


def test_a_command_that_cannot_go_on_is_started_again(tmp_path):
    count = tmp_path / "count"
    again = shell("one", "rows", f"echo >> {count}; test $(wc -l < {count}) -ge 3 || exit 75")
    with unpacked(tmp_path / "evidence.zip") as archive:
        assert run(archive, again)
        assert archive.outcome(again)["ended"] == PASSED
    assert count.read_text() == "\n" * 3


def test_what_failed_is_run_again_on_request_alone(tmp_path):
    count = tmp_path / "count"
    made = [
        shell("one", "good", f"echo good >> {count}"),
        shell("one", "bad", f"echo bad >> {count}; exit 1"),
    ]
    for again in (False, False, True):
        with unpacked(tmp_path / "out" / "evidence.zip") as archive:
            assert pieces.run(made, archive, deadline=time.monotonic() + 300, again=again)
    assert count.read_text().split() == ["good", "bad", "bad"]


def test_tests_of_a_backend_that_is_not_there_have_not_passed(tmp_path):
    """pytest ends with 5 where it collects nothing; the next run asks again."""
    backend = tmp_path / "backend"
    tests = Piece(
        "one", "tests", ("/bin/sh", "-c", f"test -f {backend} || exit 5", "pytest"), limit=60
    )
    for ended in (pieces.EMPTY, PASSED):
        with unpacked(tmp_path / "out" / "evidence.zip") as archive:
            assert run(archive, tests)
            assert archive.outcome(tests)["ended"] == ended
        backend.touch()


def test_a_repeated_piece_runs_in_every_run_and_an_absent_one_in_none(tmp_path):
    count = tmp_path / "count"
    made = [
        shell("one", "again", f"echo >> {count}", repeated=True),
        shell("one", "never", f"echo >> {count}", absent="there is no tool"),
        Piece("one", "missing", (str(tmp_path / "no-such-program"),)),
    ]
    for _ in range(2):
        with unpacked(tmp_path / "out" / "evidence.zip") as archive:
            assert run(archive, *made)
            assert "| one | never | absent: there is no tool | | |" in pieces.summary(made, archive)
            assert archive.outcome(made[2])["ended"] == FAILED
    assert count.read_text() == "\n" * 2


def test_so_many_pieces_run_at_once(tmp_path):
    """Each waits until it sees another one running, which none would alone."""
    wait = "until test $(ls {} | wc -l) -ge 2; do sleep 0.05; done".format(tmp_path / "seen")
    (tmp_path / "seen").mkdir()
    made = [shell("one", name, f"touch {tmp_path}/seen/{name}; {wait}", limit=300) for name in "ab"]
    with unpacked(tmp_path / "evidence.zip") as archive:
        assert run(archive, *made, jobs=2)
        assert {archive.outcome(piece)["ended"] for piece in made} == {PASSED}


@needs_proc
def test_an_ordinary_end_kills_what_runs_and_packs_what_is_done(tmp_path):
    pid = tmp_path / "pid"
    plan = [("one", "a", "exit 0"), ("one", "b", f"echo $$ > {pid}; sleep 600")]
    process = start(tmp_path / "evidence.zip", plan)
    wait_for(lambda: pid.is_file() and pid.read_text().strip(), "the second piece")
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    wait_for(lambda: not alive(int(pid.read_text())), "the death of the piece")
    found = contents(tmp_path / "evidence.zip")
    assert json.loads(found["one/a.json"])["ended"] == PASSED
    # Nothing stands there yet where the signal came while it was being started.
    assert json.loads(found.get("one/b.json", "{}")).get("ended", CUT) == CUT
