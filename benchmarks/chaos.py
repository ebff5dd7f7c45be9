"""Does anything get lost when processes and machines die? Random `kill -9` over three jobs on a cluster.

    python benchmarks/chaos.py --minutes 10
    python benchmarks/chaos.py --minutes 2 --seed 7 --jobs infer

The cluster is its own, of several nodes on this machine; nodes are taken away and come back. Jobs take turns:
answering a dataset (fake engine), fine-tuning (tiny model), serving (fake engine, clients that ask all the
time). While one runs, its drivers, replicas, workers, gateways, proxies and the raylets below them are
killed; a driver is started again with the same command (with `--resume` where that is the job's word for it).
Each kill waits until the job has got on since the last. When the time is up the last job comes to its end
undisturbed.

Exit code 1 if a row, a step or a request was lost, a row was answered twice or generated again though it was
finished, a job hung or gave up, or anything was left behind: processes, ports, files. Streams that had begun
are cut off with the replica that wrote them; they are counted, and no fault.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs as a script

from benchmarks.faults.answering import Answering
from benchmarks.faults.arena import Arena
from benchmarks.faults.rounds import Fire, Job, run_round
from benchmarks.faults.serving import Serving
from benchmarks.faults.traces import free_port
from benchmarks.faults.training import Training

KINDS = ("node", "driver", "replica", "worker", "gateway", "proxy")
JOBS = ("infer", "finetune", "serve")
FAULTS = (
    "failed", "hung", "lost", "doubled", "wrong", "finished_generated_again", "steps_lost", "steps_off",
    "half_written", "stayed",
)  # fmt: skip
"""Findings that must be 0."""


def main() -> int:
    """Run rounds until the time is up, print a table and one JSON line; return the exit code."""
    options = parse_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends it, the cluster ends with it
    rng, port = random.Random(options.seed), free_port()
    rounds: list[dict[str, Any]] = []
    with Arena(rng, options.num_nodes) as arena:
        for job, until in jobs_until(60 * options.minutes, options, arena.folder, port):
            fire = Fire(
                rng=rng, pause_s=(options.min_pause_s, options.max_pause_s), until=until, kinds=options.kinds,
                most_kills=math.inf if options.kills is None else options.kills, hang_s=options.hang_s,
            )  # fmt: skip
            rounds.append({"job": job.name, **run_round(arena, job, fire)})
            print(f"{len(rounds):3} {describe(rounds[-1])}", flush=True)
    left = arena.traces.left(port)
    faulty = any(found.get(name) for found in rounds for name in FAULTS) or any(left.values())
    kills = ", ".join(f"{number} {kind}" for kind, number in sorted(arena.kills.items()))
    print(f"kills: {arena.kills.total()} ({kills})")
    for kind, names in left.items():
        print(f"{kind} left behind: {len(names)}" + "".join(f"\n    {name}" for name in names))
    if faulty:
        print(f"not all is well; what the drivers and Ray said is in {arena.folder}")
    else:
        arena.clear()
    print(json.dumps({**vars(options), "kills": arena.kills, "rounds": rounds, "left": left}))
    return int(faulty)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--rounds", type=int, help="at most; default: as many as the time allows")
    parser.add_argument("--kills", type=int, help="at most; default: as many as the time allows")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is killed")
    parser.add_argument("--num_nodes", type=int, default=2, help="beside the head")
    parser.add_argument("--min_pause_s", type=float, default=2, help="between progress and the next kill")
    parser.add_argument("--max_pause_s", type=float, default=10)
    parser.add_argument("--hang_s", type=float, default=120, help="so long without progress is for ever")
    parser.add_argument("--num_rows", type=int, default=1200)
    parser.add_argument("--num_workers", default="1,2")
    parser.add_argument("--num_requests", type=int, default=3000)
    return parser.parse_args()


def jobs_until(
    duration_s: float, options: argparse.Namespace, folder: Path, port: int
) -> Iterator[tuple[Job, float]]:
    """Make the jobs of the rounds, one after another, each with the time until which it is under fire.

    Before the time begins, a training is undisturbed: the losses of the others have to be its.
    """
    expected: dict[int, float] = {}
    if "finetune" in options.jobs:
        undisturbed = Training(folder / "0-finetune", options.num_workers)
        yield undisturbed, 0.0
        expected = undisturbed.losses()
        if not expected:
            sys.exit(f"the undisturbed training did not complete: {undisturbed.log}")
    until = time.monotonic() + duration_s
    for number, name in enumerate(itertools.cycle(options.jobs), start=1):
        if time.monotonic() > until or number - 1 == options.rounds:
            return
        own = folder / f"{number}-{name}"
        if name == "infer":
            yield Answering(own, options.num_rows), until
        elif name == "finetune":
            yield Training(own, options.num_workers, expected), until
        else:
            yield Serving(own, port, options.num_requests), until


def describe(found: Mapping[str, Any]) -> str:
    """Say what came of a round; an exclamation mark is behind what must not be."""
    numbers = {name: value for name, value in found.items() if name != "job"}
    counts = (f"{name} {value:g}{'!' * bool(value and name in FAULTS)}" for name, value in numbers.items())
    return f"{found['job']:9} {', '.join(counts)}"


if __name__ == "__main__":
    sys.exit(main())
