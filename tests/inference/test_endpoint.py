"""A run that a server answers: what is planned, what is kept, and how the limit is shared on a cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from benchmarks.common.faulty_server import MODEL, Faults, FaultyServer
from helpers.processes import parquet_rows, wait_until
from helpers.rows import TASK
from vlmray import cluster
from vlmray.cluster import plans, resources
from vlmray.cluster.resources import Node
from vlmray.config import InferConfig
from vlmray.engines.openai.shares import Report, State
from vlmray.engines.openai.waiting import Waiting
from vlmray.errors import OptionError
from vlmray.inference import stages
from vlmray.inference.endpoint.checking import check_server
from vlmray.inference.endpoint.keeping import Key, SharedKeeper, find_actor
from vlmray.inference.job import run_inference
from vlmray.inference.plan import InferenceError, plan_inference
from vlmray.schema import Row

KEY = "a secret key"


def config(tmp_path: Path, url: str = "http://127.0.0.1:9", **options: Any) -> InferConfig:
    given: dict[str, Any] = {
        "engine": "openai", "endpoint": url, "model_id": MODEL, "dataset_name": "charts?num_rows=40",
        "sample_slices": "[:]", "output_dir": str(tmp_path / "out"), **options,
    }  # fmt: skip
    return InferConfig(**given)


# Before it starts


def test_a_folder_goes_on_with_the_same_server_and_model_alone(tmp_path: Path) -> None:
    run = plan_inference(config(tmp_path))  # which asks nobody
    assert len(run.pending) == 40
    stages.save_rows([stages.score_row({"sample_id": "test-000000", "row_index": 0, "question": "?",
        "choices": [], "answers": [], "family": None, "error": None, "prediction": "3"}, run.task)],
        run.folder)  # fmt: skip
    assert len(plan_inference(config(tmp_path, max_in_flight=3, endpoint_timeout_s=7)).pending) == 39
    for changed in ({"url": "http://other:9"}, {"model_id": "other"}, {"max_pixels": 10_000}):
        with pytest.raises(ValueError, match="holds another run"):
            plan_inference(config(tmp_path, **changed))


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"model_id": "other"}, KEY, r"--model_id: http\S+ does not serve 'other'; it serves faulty"),
        ({}, "wrong", r"--endpoint: http\S+ does not list its models: wrong key"),
    ],
)
def test_a_wrong_model_or_key_is_refused_before_anything_starts(
    options: dict[str, Any], key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMRAY_API_KEY", key)
    monkeypatch.setattr(cluster, "connect", lambda level: pytest.fail("Ray was started"))
    with FaultyServer(Faults(key=KEY)).running() as server:
        run = plan_inference(config(tmp_path, server.url, **options))
        with pytest.raises(OptionError, match=f"^{message}"):
            run_inference(run)


def test_a_server_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--endpoint: http://127.0.0.1:9 does not list its models: Conn"):
        check_server(config(tmp_path))


def test_a_url_of_an_image_is_passed_on_unfetched() -> None:
    row: Row = {
        "sample_id": "test-000000", "question": "?", "choices": [], "answers": [], "error": None,
        "image_url": "http://127.0.0.1:9/never.png",
    }  # fmt: skip
    (ready,) = stages.prepare_rows([row], TASK, fetches_images=False)
    (request,) = stages.make_requests([ready], TASK)
    assert (ready["error"], request.images) == (None, ["http://127.0.0.1:9/never.png"])


def test_a_key_is_not_shown() -> None:
    assert KEY not in repr(Key(KEY))
    assert KEY not in f"{[Key(KEY)]}"


def test_what_is_awaited_is_said_once_and_again_when_it_changes() -> None:
    said: list[str] = []
    waiting = Waiting("http://host", 600, said.append)
    waiting.look(State(num_wanted=5))
    waiting.look(State(num_wanted=0, silent_s=100))  # nobody waits
    assert said == []
    for silent_s in (40, 41, 42):
        waiting.look(State(num_wanted=5, silent_s=silent_s, unanswered_s=silent_s))
    assert said == ["waiting for http://host: it has said nothing for 40 s and is given up after 600 s"]
    waiting.look(State(num_wanted=5, unanswered_s=50))
    assert "too much to do" in said.pop()
    waiting.look(State(num_wanted=5, pause_s=50))
    assert "left alone for 50 s" in said.pop()
    waiting.look(State(num_wanted=5))
    waiting.look(State(num_wanted=5, pause_s=30))
    assert "left alone for 30 s" in said.pop()


# On a cluster


def test_clients_ask_for_no_gpu_and_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node(name=name, resources={"GPU": 4, "CPU": 4}) for name in "ab"]
    for module in (plans, resources):
        monkeypatch.setattr(module, "present_nodes", lambda: nodes)
    monkeypatch.setattr(plans, "node_cpus", lambda: 4.0)
    plan = cluster.plan_clients(None)
    assert (plan.min_replicas, plan.max_replicas, plan.num_gpus, plan.runtime_env) == (1, 1, 0, {})
    assert 0 < plan.num_cpus <= 1
    assert cluster.plan_clients((2, 3)).max_replicas == 3


def report(holder: str, in_flight: int = 0) -> Report:
    return Report(holder=holder, num_in_flight=in_flight, num_wanted=50)


@pytest.mark.usefixtures("two_cpus")
def test_one_limit_is_shared_and_outlives_the_loss_of_who_keeps_it() -> None:
    one, other = (SharedKeeper("http://host/v1/", 64) for _ in range(2))

    async def places(keeper: SharedKeeper, holder: str) -> int:
        return (await keeper.report(report(holder))).places

    async def share() -> None:
        first = await places(one, "one")
        assert first >= 1
        for _ in range(3):
            told = [await places(one, "one"), await places(other, "other")]
            assert sum(told) <= 4
        assert min(told) >= 1

    asyncio.run(share())
    actor = find_actor("http://host", 64)  # the same, however it is written
    state = ray.get(actor.state.remote())
    assert (state.limit, state.num_wanted) == (4, 100)
    ray.kill(actor)

    async def go_on() -> int:
        await places(one, "one")  # by what it was told before
        return await places(one, "one")

    wait_until(lambda: asyncio.run(go_on()) >= 1 and _is_there("http://host"), timeout_s=60)


def _is_there(url: str) -> bool:
    try:
        return bool(ray.get(find_actor(url, 64).state.remote(), timeout=10))
    except ray.exceptions.RayError:
        return False


@pytest.mark.usefixtures("two_cpus")
def test_a_run_is_answered_and_its_key_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMRAY_API_KEY", KEY)
    faults = Faults(key=KEY, refuse=0.05, drop=0.05, latency_s=0.02, retry_after_s=0.2, capacity=12)
    with FaultyServer(faults).running() as server:
        given = config(tmp_path, server.url, output_format="both", batch_size=8)
        summary = run_inference(plan_inference(given))
        assert (summary.num_rows, summary.num_failed) == (40, 0)
        rows = parquet_rows(tmp_path / "out")
        assert {row["num_prompt_tokens"] for row in rows.values()} == {7}
        asked = len(server.seen.bodies)
        assert run_inference(plan_inference(given)).num_rows == 40
        assert len(server.seen.bodies) == asked
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 40
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.usefixtures("two_cpus")
def test_a_server_that_says_nothing_ends_the_run_with_one_line(tmp_path: Path) -> None:
    with FaultyServer(Faults(stall=1.0)).running() as server:
        run = plan_inference(config(tmp_path, server.url, endpoint_timeout_s=2))
        with pytest.raises(InferenceError) as error_info:
            run_inference(run)
    message = str(error_info.value)
    assert "has not answered for" in message
    assert "0 of 40 rows are answered" in message
    assert "\n" not in message
    # Calls that still wait for the server would hold what the next run needs.
    wait_until(lambda: ray.available_resources().get("CPU") == 2, 10)


OTHER_DRIVER = """
import asyncio, sys, time, ray
from vlmray.engines.openai.shares import Report
from vlmray.inference.endpoint.keeping import SharedKeeper

ray.init(address=sys.argv[1], log_to_driver=False)

async def ask():
    keeper, deadline, places = SharedKeeper(sys.argv[2], 64), time.monotonic() + 60, 0
    while places < 2 and time.monotonic() < deadline:
        told = await keeper.report(Report(holder="other", num_in_flight=0, num_wanted=50))
        places = told.places
        await asyncio.sleep(0.1)
    print(told.state.num_wanted, places)

asyncio.run(ask())
"""


def _other_driver(url: str, meanwhile: Callable[[], object] = lambda: None) -> list[int]:
    """What another driver of the cluster hears: what is wanted of the server in all, and its own places."""
    address = ray.get_runtime_context().gcs_address
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_DRIVER, address, url], stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: [meanwhile(), other.poll()][1] is not None, timeout_s=120)
    return [int(word) for word in other.communicate()[0].split()]


@pytest.mark.usefixtures("two_cpus")
def test_drivers_share_a_limit_and_none_needs_the_other_to_stay() -> None:
    keeper = SharedKeeper("http://both", 64)

    def places() -> int:
        return asyncio.run(keeper.report(report("one"))).places

    wait_until(lambda: places() == 4, timeout_s=60)
    assert _other_driver("http://both", places) == [100, 2]
    assert places() == 2
    assert _other_driver("http://left") == [50, 4]  # this driver began, and is gone now
    keeper = SharedKeeper("http://left", 64)
    wait_until(lambda: places() == 4, timeout_s=60)
