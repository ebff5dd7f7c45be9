"""Which node holds what, and how CPUs are shared so that all of it has a place; nothing of Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmray.cluster.resources import Node

Bundle = Mapping[str, float]
"""What one replica or worker asks for, all of it of one node: `{"GPU": 1}`."""

_ROUNDING = 1e-6
_GRID = 64
"""Shares are multiples of 1/64: exact in binary, so that those who divide by them find whole numbers."""


def place(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> list[Node] | None:
    """Return the node that would hold each bundle, as few nodes as possible; None if they do not all fit.

    >>> one, two = (Node(name=name, resources={"CPU": 2}) for name in "ab")
    >>> [node.name for node in place([{"CPU": 1.5}] * 2, [one, two])]
    ['a', 'b']
    """
    free = [dict(node.resources) for node in nodes]
    holders = []
    for bundle in bundles:
        at = next((at for at, left in enumerate(free) if _fits(bundle, left)), None)
        if at is None:
            return None
        for kind, asked in bundle.items():
            free[at][kind] = free[at].get(kind, 0) - asked
        holders.append(nodes[at])
    return holders


def _fits(bundle: Bundle, left: Bundle) -> bool:
    return all(asked <= left.get(kind, 0) + _ROUNDING for kind, asked in bundle.items())


def rooms(sizes: Sequence[float], cpus_per_task: float) -> list[float]:
    """Return what nodes of so many CPUs have beside a task each.

    While workers or replicas take no more than that in all, some node has room for a task, wherever they are.
    """
    return [size - min(size, cpus_per_task) for size in sizes]


def largest_share(sizes: Sequence[float], count: int) -> float:
    """Return the most that each of `count` may have, if nodes of these sizes hold them all; 0 without nodes.

    >>> largest_share([2, 3], 3)
    1.5
    """
    shares = sorted({size / part for size in {*sizes} for part in range(1, count + 1)}, reverse=True)
    return next((share for share in shares if share and _num_fitting(sizes, share) >= count), 0.0)


def share_cpus(sizes: Sequence[float], count: int, most: int) -> tuple[float, float]:
    """Divide nodes of these CPUs among workers, and the tasks that feed them.

    Args:
        sizes: CPUs of each node.
        count: Workers that shall have a place.
        most: Workers that there may be, if these nodes or others hold them.

    Returns:
        CPUs of each worker, and CPUs of a task, for which each node has room whatever number of the workers
        is on it.
    """
    beside_a_task = [size - min(1.0, size / 2) for size in sizes]
    share = max(1, int(_GRID * largest_share(beside_a_task, count))) / _GRID
    if min(left := _left(sizes, share, most)) < 1 / _GRID:  # some node could be full to its last CPU
        share += 1 / _GRID
        left = _left(sizes, share, most)
    return share, min(1.0, max(1, int(_GRID * min(left))) / _GRID)


def _left(sizes: Sequence[float], share: float, most: int) -> list[float]:
    """Return what is left on each node if it holds as many workers as it can."""
    return [size - share * min(most, _num_fitting([size], share)) for size in sizes]


def _num_fitting(sizes: Sequence[float], share: float) -> int:
    return sum(int(size / share + _ROUNDING) for size in sizes)
