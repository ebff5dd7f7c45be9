"""Say what a job would start and where, for those who only want to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlmray.cluster.placement import Bundle, place
from vlmray.cluster.resources import Node, present_nodes, startable_nodes
from vlmray.cluster.waiting import Asked

_MOST_NODES = 8


def preview(asked: Asked, most: int) -> list[tuple[str, str]]:
    """Return lines, each a title and a text: how many would start with what, and which nodes would hold them.

    Args:
        asked: The fewest that the job does with.
        most: The most that it would have.
    """
    number = f"{asked.count}" if most == asked.count else f"{asked.count} to {most}"
    each = " each" if most > 1 else ""
    return [(f"{asked.name}s", f"{number} with {asked.each}{each}"), ("nodes", _name_nodes(asked, most))]


def _name_nodes(asked: Asked, most: int) -> str:
    here = present_nodes()
    held = _hold(asked.resources, most, here)
    later = _hold(asked.resources, most - held.total(), _still_to_start(here))
    missing = most - held.total() - later.total()
    parts = [f"{name}: {count}" for name, count in held.most_common(_MOST_NODES)]
    if len(held) > _MOST_NODES:
        parts.append(f"{len(held) - _MOST_NODES} more nodes")
    parts += [f"{count} on nodes of type {name}, which would be started" for name, count in later.items()]
    return "; ".join([*parts, f"no place for {missing} yet"] if missing else parts)


def _hold(bundle: Bundle, count: int, nodes: Sequence[Node]) -> Counter[str]:
    """Count how many of some bundles each node would hold, where as many as possible have a place."""
    tries = (place([bundle] * fewer, nodes) for fewer in range(count, 0, -1))
    return Counter(node.name for node in next((found for found in tries if found), ()))


def _still_to_start(here: Sequence[Node]) -> list[Node]:
    """Return the nodes that the autoscaler may start beside those that it has started."""
    rest = startable_nodes()
    for node in here:
        same = (other for other in rest if all(node.has(kind) == other.has(kind) for kind in ("GPU", "CPU")))
        if (twin := next(same, None)) is not None:
            rest.remove(twin)
    return rest
