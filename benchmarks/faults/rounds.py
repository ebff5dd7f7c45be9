"""One job under fire: what it has to do, and how it is killed while it does it."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.faults.arena import Arena

_POLL_S = 0.1
_MOST_FAILURES = 3
_INTERRUPTED = 130
"""Exit code of a driver that is stopped while it starts."""


class Job(Protocol):
    """A job of a round.

    Attributes:
        name: The name of its script.
        titles: Kinds of its processes that may be killed: what Ray calls them.
        log: File that takes what its drivers say.
    """

    name: str
    titles: Mapping[str, str]
    log: Path

    def options(self, num_starts: int) -> Sequence[str]:
        """Return the command line of a driver, by how many there were before."""
        ...

    def progress(self) -> int:
        """Return a number that grows as long as the job gets on."""
        ...

    def has_served(self) -> bool:
        """Whether a job that would go on for ever has done what it was started for."""
        ...

    def before_kill(self) -> None:
        """Note what the kill must not undo."""
        ...

    def findings(self) -> dict[str, float]:
        """Return what went wrong, and what else there is to count, once the job has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fire:
    """When what is killed.

    Attributes:
        rng: Draws both.
        pause_s: Shortest and longest time from progress to the next kill.
        until: No kills from then on, by `time.monotonic`.
        kinds: What may be killed; nothing: all there is.
        most_kills: No more kills than this, in all rounds.
        hang_s: Without any progress for this long, a job hangs.
    """

    rng: random.Random
    pause_s: tuple[float, float]
    until: float
    kinds: Sequence[str] = ()
    most_kills: float = math.inf
    hang_s: float = 120.0

    def is_over(self, now: float, num_kills: int) -> bool:
        """Whether nothing is killed any more."""
        return now >= self.until or num_kills >= self.most_kills


def run_round(arena: Arena, job: Job, fire: Fire) -> dict[str, float]:
    """Run a job to its end and kill what belongs to it meanwhile; return what came of it.

    A kill waits until the job got on since the one before, or there would be no end, and then a random time.
    """
    kinds = {"node": "", "driver": "", **job.titles}
    kinds = {kind: title for kind, title in kinds.items() if kind in (fire.kinds or kinds)}
    failed = hung = num_starts = 0
    driver = arena.start(job.name, job.options(num_starts), job.log)
    reached, reached_at, kill_at, longest_s = job.progress(), time.monotonic(), math.inf, 0.0
    while not job.has_served():
        time.sleep(_POLL_S)
        arena.tend()
        now = time.monotonic()
        longest_s = max(longest_s, now - reached_at)
        if longest_s > fire.hang_s:
            hung = 1
            break
        if (progress := job.progress()) != reached:
            reached, reached_at = progress, now
            kill_at = min(kill_at, now + fire.rng.uniform(*fire.pause_s))
        if kill_at <= now and driver.poll() is None and not fire.is_over(now, arena.kills.total()):
            job.before_kill()
            drawn = fire.rng.sample([*kinds], len(kinds))
            any(arena.kill(kind, kinds[kind], driver) for kind in drawn)  # the first that there is
            kill_at = math.inf
        code = driver.poll()
        if code == 0 or failed > _MOST_FAILURES:
            break
        if code is not None:
            failed += code != -signal.SIGKILL
            num_starts += 1
            driver = arena.start(job.name, job.options(num_starts), job.log)
    failed += _stop(driver, fire.hang_s) not in (0, _INTERRUPTED) and not hung
    return {
        "failed": failed, "hung": hung, "starts": num_starts + 1, "longest_pause_s": round(longest_s, 1),
        **job.findings(), "stayed": len(arena.staying([*job.titles.values()])),
    }  # fmt: skip


def _stop(driver: subprocess.Popen[bytes], patience_s: float) -> int:
    """Have a driver end as Ctrl-C does, unless it has; return its exit code."""
    driver.send_signal(signal.SIGTERM)
    try:
        return driver.wait(patience_s)
    except subprocess.TimeoutExpired:
        driver.kill()
        return driver.wait()
