"""The chaos benchmark counts what is lost, and a short one of it loses nothing."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.faults.answering import Answering
from benchmarks.faults.serving import Serving
from benchmarks.faults.training import Training
from helpers.paths import ROOT
from helpers.processes import wait_until

pytestmark = pytest.mark.nodes


def test_a_short_one_loses_nothing() -> None:
    options = "--jobs infer --rounds 1 --kills 2 --kinds replica driver --max_pause_s 3 --num_rows 200"
    done = subprocess.run(
        [sys.executable, "benchmarks/chaos.py", *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert sum(said["kills"].values()) == 2
    assert [(found["rows"], found["lost"]) for found in said["rounds"]] == [(200, 0)]
    assert "kills: 2 (" in done.stdout


# What each count is of


def answer(folder: Path, part: str, *numbers: int, error: str | None = None) -> None:
    rows = [{"sample_id": f"test-{number:06d}", "error": error} for number in numbers]
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "predictions" / f"{part}.parquet")
    for row in rows:
        (folder / f"{row['sample_id']}_out.json").touch()


def test_rows_that_are_lost_doubled_or_asked_again_are_counted(tmp_path: Path) -> None:
    job = Answering(tmp_path / "job", num_rows=5)
    output, log = tmp_path / "job" / "answers", tmp_path / "job" / "asked.log"
    log.write_text("test-000000\ntest-000001\n")
    answer(output, "part-a", 0)
    job.before_kill()
    log.write_text(log.read_text() + "test-000000\ntest-000001\ntest-000002\n")
    answer(output, "part-b", 0, 1)
    answer(output, "part-c", 2, error="the replica died")
    (output / ".part-d.tmp").touch()
    assert job.findings() == {
        "rows": 5,
        "lost": 3,  # two without a result, one with an error
        "doubled": 1,
        "finished_generated_again": 1,  # the first: the second had no result yet
        "unfinished_generated_again": 1,
        "half_written": 1,
    }


def test_steps_that_are_lost_or_off_are_counted(tmp_path: Path) -> None:
    job = Training(tmp_path / "job", "2", {1: 0.5, 2: 0.4, 3: 0.3}, num_steps=3)
    assert job.findings()["steps_lost"] == 3
    (tmp_path / "job" / "lora").mkdir()
    history = [{"step": 1, "loss": 0.5004}, {"step": 2, "loss": 0.43}, {"step": 2, "eval_loss": 9.0}]
    (tmp_path / "job" / "lora" / "run.json").write_text(json.dumps({"history": history}))
    found = job.findings()
    assert (found["steps_lost"], found["steps_off"]) == (1, 1)
    assert found["largest_loss_difference"] == pytest.approx(0.03)


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Hangs up on every fourth request, cuts every eighth stream, and answers the rest."""

    asked = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with threading.Lock():
            Unreliable.asked += 1
            number = Unreliable.asked
        if number % 4 == 0:
            return
        self.send_response(200)
        self.end_headers()
        text = body["messages"][0]["content"]
        event: dict[str, Any] = {"choices": [{"delta": {"content": text}, "message": {"content": text}}]}
        if not body["stream"]:
            self.wfile.write(json.dumps(event).encode())
            return
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if number % 8 != 2:
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unreliable() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unreliable) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield server.server_port
        server.shutdown()


def test_clients_ask_again_and_count_what_was_cut_off(unreliable: int, tmp_path: Path) -> None:
    job = Serving(tmp_path / "job", unreliable, num_requests=40, num_clients=1)
    job.options(0)
    wait_until(job.has_served)
    found = job.findings()
    assert (found["lost"], found["wrong"]) == (0, 0)
    assert found["asked_again"] > 0
    assert found["cut_off"] > 0
    assert job.progress() + found["cut_off"] == 40


LEAVING = """
import json, socket, subprocess, sys
from pathlib import Path
from benchmarks.faults.traces import Traces, free_port

port, folder = free_port(), Path(sys.argv[1])
traces = Traces(folder)
print(json.dumps(traces.left(port)))
subprocess.run(["sh", "-c", "sleep 60 &"], check=True)  # an orphan
(folder / "half").touch()
listener = socket.create_server(("127.0.0.1", port))
left = traces.left(port, patience_s=0.5)
print(json.dumps(left))
subprocess.run(["kill", left["processes"][0].split()[0]], check=True)
"""


def test_what_is_left_behind_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    nothing, left = map(json.loads, done.stdout.splitlines())
    assert nothing == {"processes": [], "ports": [], "files": []}
    (process,), (port,), files = left.values()
    assert process.endswith(" sleep 60")
    assert port.isdigit()
    assert files == [str(tmp_path / "half")]
