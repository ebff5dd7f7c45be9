"""What the board knows of workers, and which failures end a run."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from vlmray import cluster
from vlmray.errors import RunError
from vlmray.finetune.progress import Board, Restarts

DEAD = WorkerHealthCheckFailedError("no answer", RayActorError())
ANNOUNCED = WorkerHealthCheckFailedError("no answer", RayActorError(preempted=True))
FAULT = ValueError("a fault")


class Remote:
    """Calls the methods of an object as those of an actor, at once."""

    def __init__(self, called: Any) -> None:
        self._called = called

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._called, name)
        return type("Method", (), {"remote": staticmethod(method)})


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(ray, "get", lambda value: value)
    for name in ("dead", "gone"):
        monkeypatch.setattr(cluster, name, lambda nodes: {*nodes} & {"gone"})
    return Board()


def begin(board: Board, *nodes: str) -> None:
    for rank, node in enumerate(nodes):
        board.join(rank, len(nodes), node)


def test_the_board_knows_whether_all_workers_run(board: Board) -> None:
    def running() -> bool:
        return board.read()[0]["running"]

    assert not running()
    board.join(0, 2, "a")
    assert not running()
    board.join(1, 2, "b")
    assert running()
    assert board.leave() == {"a", "b"}
    assert not running()
    assert board.leave() == set()
    begin(board, "a")
    assert running()
    board.join(1, 2, "c")  # the first of a larger group; nobody has told that the others are gone
    assert not running()
    board.join(0, 2, "a")
    assert running()
    board.join(0, 2, "a")  # the same group once more
    assert not running()
    begin(board, "a", "gone")  # the controller has not told of it yet
    assert not running()


def test_notes_are_shown_once(board: Board) -> None:
    for note in ("lost", "lost", "found"):
        board.note(note)
    assert board.read()[1] == ["lost", "found"]
    board.note("found")
    begin(board, "a", "b")
    board.tell({"step": 3, "started": True})
    told = ["going on from the checkpoint of step 3 with 2 workers"]
    assert board.read() == ({"step": 3, "running": True}, told)


def test_machines_may_leave_any_number_of_times(board: Board) -> None:
    restarts = Restarts(Remote(board), max_failures=0)
    for _ in range(5):
        begin(board, "here", "gone")
        restarts.after_exception(None, {0: FAULT, 1: DEAD})
        assert board.read()[1] == ["a machine was lost; starting again from the last checkpoint"]
        begin(board, "here", "here")
        restarts.after_exception(None, {0: FAULT, 1: ANNOUNCED})
        assert board.read()[1] == ["a machine was lost; starting again from the last checkpoint"]
    begin(board, "here", "here")
    with pytest.raises(RunError, match=r"^ValueError: a fault$"):
        restarts.after_exception(None, {0: FAULT})


def test_what_fails_without_a_new_checkpoint_ends_the_run(board: Board) -> None:
    restarts = Restarts(Remote(board), max_failures=2)
    for _ in range(3):
        for _ in range(2):
            begin(board, "here")
            restarts.after_exception(None, {1: DEAD, 0: FAULT})
        restarts.after_report(None, [{}], object())
    told = "worker 1 was lost (its process died); starting again from the last checkpoint"
    assert board.read()[1] == [told] * 6
    for _ in range(2):
        restarts.after_exception(None, {0: FAULT})
    with pytest.raises(RunError, match="a fault"):
        restarts.after_exception(None, {0: FAULT})
