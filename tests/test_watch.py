"""A process whose cluster is gone says so; one that has left it has nothing to do with it any more."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

HEAD_IS_GONE = """
    import psutil, threading
    from vlmray import cluster
    cluster.connect()
    [head] = [each for each in psutil.Process().children(recursive=True) if each.name() == "gcs_server"]
    head.kill()
    threading.Event().wait(60)
"""
LEFT_BEFORE = """
    import ray
    from vlmray.cluster import connection, watch
    connection.connect()
    ray.shutdown()
    connection.connect()
    ray.get(ray.remote(num_cpus=0)(lambda: None).remote())
    import time
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        assert len([each for each in watch.threading.enumerate() if each.name == "watch-cluster"]) <= 2
        time.sleep(0.1)
    assert len([each for each in watch.threading.enumerate() if each.name == "watch-cluster"]) == 1
    print("still here")
"""


def python(script: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RAY_ADDRESS": "local", "RAY_gcs_rpc_server_reconnect_timeout_s": "12"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


def test_a_head_that_is_gone_is_said_in_one_line() -> None:
    done = python(HEAD_IS_GONE)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the head of the Ray cluster at ")
    assert line.endswith(" is gone; what was finished is kept, run the job again on a cluster")
    assert "Traceback" not in done.stderr


def test_a_cluster_that_was_left_may_go() -> None:
    done = python(LEFT_BEFORE)
    assert done.stdout.strip() == "still here", done.stderr
