"""Plans for clusters of several nodes: all that is planned has a place, whatever else is where."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmray import cluster
from vlmray.cluster import plans, resources
from vlmray.cluster.placement import largest_share, place, rooms, share_cpus
from vlmray.cluster.resources import Node
from vlmray.errors import OptionError


def nodes_of(*sizes: float, kind: str = "CPU") -> list[Node]:
    return [Node(name=f"node {at}", resources={kind: size}) for at, size in enumerate(sizes)]


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the cluster these nodes, and these that could be started."""

    def give(present: Sequence[Node], startable: Sequence[Node] = ()) -> None:
        for module in (plans, resources):
            monkeypatch.setattr(module, "present_nodes", lambda: list(present))
            monkeypatch.setattr(module, "startable_nodes", lambda: list(startable))

    return give


def _random_sizes(rng: random.Random) -> list[float]:
    return [rng.choice([1, 2, 2, 3, 4, 8, 16]) for _ in range(rng.randint(1, 5))]


# Training workers


def test_workers_and_the_tasks_that_feed_them_have_a_place_on_every_node() -> None:
    rng = random.Random(0)
    for _ in range(500):
        sizes = _random_sizes(rng)
        count = rng.randint(1, sum(map(int, sizes)))
        most = count + rng.choice([0, 0, 1, 9])
        per_worker, per_task = share_cpus(sizes, count, most)
        assert 0 < per_task <= 1
        assert place([{"CPU": per_worker}] * count, nodes_of(*sizes)) is not None
        for size in sizes:
            for on_node in range(most + 1):
                if on_node * per_worker <= size:
                    assert size - on_node * per_worker >= per_task


def test_who_divides_by_a_share_finds_whole_workers() -> None:
    """As Ray Train does to see how many workers the nodes that are left hold."""
    rng = random.Random(1)
    for _ in range(300):
        sizes = _random_sizes(rng)
        per_worker, _ = share_cpus(sizes, count := rng.randint(1, sum(map(int, sizes))), count)
        assert sum([per_worker] * count) // per_worker == count


@pytest.mark.parametrize(
    ("sizes", "worker_range", "expected"),
    [
        # One machine: the tasks get a CPU, or half of the only one, and the workers the rest.
        ([2], None, (2, 0.5, 1.0, 1)),
        ([2], (1, 1), (1, 1.0, 1.0, 1)),
        ([1], None, (1, 0.5, 0.5, 1)),
        ([16], (2, 2), (2, 7.5, 1.0, 7)),
        # Several: one worker on each, and nearly a CPU for tasks beside it.
        ([0, 2, 2], (2, 2), (2, 65 / 64, 63 / 64, 1)),
        ([0, 2, 2, 2], (2, 2), (2, 65 / 64, 63 / 64, 1)),
        ([0, 2, 2, 2], (3, 3), (3, 65 / 64, 63 / 64, 1)),
        ([0, 8, 8], (1, 2), (2, 7.0, 1.0, 7)),
        ([0, 1, 1], (1, 2), (2, 33 / 64, 31 / 64, 1)),
        ([1], (1, 2), (2, 33 / 64, 31 / 64, 1)),
        # More may train than there are CPUs, once machines have come.
        ([0, 8, 8], (1, 100), (100, 0.875, 0.125, 1)),
    ],
)
def test_workers_on_cpus(sizes: list[float], worker_range: Any, expected: Any, having: Any) -> None:
    having(nodes_of(*sizes))
    plan = cluster.plan_workers(worker_range)
    assert (plan.num_workers, plan.resources["CPU"], plan.cpus_per_task, plan.num_threads) == expected
    assert plan.min_workers == (worker_range or (expected[0],))[0]


def test_workers_on_gpus(having: Any) -> None:
    gpus = [Node(name=str(at), resources={"CPU": 8, "GPU": 2}) for at in range(3)]
    having([*nodes_of(4), *gpus])
    plan = cluster.plan_workers(None)
    assert (plan.num_workers, plan.min_workers, plan.resources) == (6, 6, {"GPU": 1})
    assert plan.num_threads is None
    assert plan.cpus_per_task == 1


@pytest.mark.parametrize(
    ("present", "startable", "worker_range", "problem"),
    [
        (nodes_of(2, 2), [], (5, 5), "5 needs 5 CPUs and the cluster has 4, with no more to start"),
        (nodes_of(1.5, 1.5), [], (3, 9), "3 needs 3 CPUs and the cluster has 2, with no more to start"),
        (nodes_of(0.5, 0.5, 1, kind="GPU"), [], (2, 2), "2 needs 2 GPUs and the cluster has 1, with no"),
        (
            nodes_of(4),
            nodes_of(1, 1, kind="GPU"),
            (3, 3),
            "3 needs 3 GPUs and the cluster has 0, and may start 2",
        ),
    ],
)
def test_what_no_nodes_hold_is_refused(
    present: Any, startable: Any, worker_range: Any, problem: str, having: Any
) -> None:
    having(present, startable)
    with pytest.raises(OptionError, match=r"lower --num_workers$") as caught:
        cluster.plan_workers(worker_range)
    assert caught.value.problem.startswith(problem)


# Replicas


def test_a_task_finds_room_wherever_replicas_are(having: Any) -> None:
    rng = random.Random(2)
    for _ in range(300):
        sizes = _random_sizes(rng)
        having(nodes_of(0, *sizes))
        plan = cluster.plan_replicas((1, rng.randint(1, 8)), None)
        bundles = [{"CPU": plan.num_cpus}] * plan.max_replicas
        assert plan.num_cpus > 0
        for order in itertools.islice(itertools.permutations(nodes_of(*sizes)), 6):
            holders = place(bundles, order)
            assert holders is not None
            left = [node.has("CPU") - sum(each is node for each in holders) * plan.num_cpus for node in order]
            assert max(left) >= cluster.cpus_per_task() - 1e-6


def test_one_machine_is_divided_as_ever(having: Any) -> None:
    for size, count in itertools.product([1, 2, 3, 4, 16], range(1, 6)):
        having(nodes_of(size))
        assert cluster.cpus_per_task() == min(1.0, size / 2)
        assert cluster.plan_replicas((1, count), None).num_cpus == min(1.0, max(size - 1, size / 2) / count)


# Places


def test_bundles_are_placed_where_all_they_ask_for_is() -> None:
    small, large = (Node(name=name, resources={"CPU": 4, "GPU": gpus}) for name, gpus in (("s", 1), ("l", 2)))
    assert place([{"GPU": 1}] * 3, [small, large]) == [small, large, large]
    assert place([{"GPU": 2}], [small, large]) == [large]
    assert place([{"GPU": 2}] * 2, [small, large]) is None
    assert place([{"GPU": 1, "CPU": 3}] * 2, [large, small]) == [large, small]
    assert place([], []) == []
    assert largest_share([], 2) == 0
    assert rooms([0.5, 4], 1.0) == [0, 3]


def test_what_the_launcher_may_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 4}},
            "small": {"resources": {"CPU": 8}, "max_workers": 2},
            "large": {"resources": {"CPU": 8, "GPU": 2}, "max_workers": 2},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(resources, "_BOOTSTRAP_CONFIG", tmp_path / "config.yaml")
    assert [node.name for node in resources.startable_nodes()] == ["large", "large", "small"]
    assert (resources.startable("GPU"), resources.startable("CPU")) == (4, 24)
    monkeypatch.setattr(resources, "_BOOTSTRAP_CONFIG", tmp_path / "none.yaml")
    assert resources.startable_nodes() == []
