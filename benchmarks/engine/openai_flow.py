"""How the client of `--engine openai` finds what a server can take, against one that fails on purpose.

    python -m benchmarks.engine.openai_flow --num_rows 600 --capacity 24

The server refuses, drops, stalls and is unavailable at random, and refuses whatever is one too many. Prints
requests in flight over time, as the server counts them, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import defaultdict

from benchmarks.common.faulty_server import MODEL, Faults, FaultyServer, answer_to
from vlmray.engines import build_engine
from vlmray.schema import GenerationRequest

_FAULTS = {"refuse": 0.03, "unavailable": 0.02, "drop": 0.02, "stall": 0.002}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num_rows", type=int, default=600)
    parser.add_argument("--capacity", type=int, default=24)
    parser.add_argument("--latency_s", type=float, default=0.4)
    parser.add_argument("--token_s", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without_faults", action="store_true", help="the capacity alone")
    options = parser.parse_args()
    faults = Faults(
        capacity=options.capacity,
        latency_s=options.latency_s,
        token_s=options.token_s,
        seed=options.seed,
        **({} if options.without_faults else _FAULTS),
    )
    print(json.dumps(_run(faults, options.num_rows)))


def _run(faults: Faults, num_rows: int) -> dict[str, object]:
    requests = [_request(number) for number in range(num_rows)]
    with FaultyServer(faults).running() as server:
        engine = build_engine(engine="openai", model_id=MODEL, endpoint=server.url)
        with contextlib.closing(engine):
            started = time.monotonic()
            found = engine.generate(requests)
            elapsed_s = time.monotonic() - started
    num_right = sum(
        completion.text == answer_to(json.dumps([_question(number)]))
        for number, completion in enumerate(found)
    )
    shift_s = started - server.seen.started
    over = [at - shift_s for at in server.seen.over]
    _print_curve([(at - shift_s, count) for at, count in server.seen.curve], over)
    # The ceiling is known once it was met twice; what comes then is the server's or a single new trial.
    settled_s = 0.5 * elapsed_s
    return {
        "num_rows": num_rows,
        "num_right": num_right,
        "num_failed": sum(completion.error is not None for completion in found),
        "rows_per_s": round(num_rows / elapsed_s, 1),
        "elapsed_s": round(elapsed_s, 1),
        "capacity": faults.capacity,
        "faults": {name: count for name, count in server.seen.faults.items() if name != "none"},
        "over_capacity": len(over),
        "last_over_capacity_s": round(max(over), 1) if over else None,
        "over_capacity_in_second_half": sum(at > settled_s for at in over),
        "answered_twice": sum(count - 1 for count in server.seen.answered.values()),
    }


def _print_curve(curve: list[tuple[float, int]], over: list[float]) -> None:
    """Print the most requests in flight in each second, and those that were too many."""
    most: defaultdict[int, int] = defaultdict(int)
    for at, count in curve:
        most[int(at)] = max(most[int(at)], count)
    print("second  in flight  too many")
    for second in range(max(most, default=0) + 1):
        num_over = sum(int(at) == second for at in over)
        print(f"{second:6d}  {most[second]:9d}  {num_over or '':>8}  {'#' * most[second]}")


def _question(number: int) -> str:
    return f"How many are {number}?"


def _request(number: int) -> GenerationRequest:
    parts = [{"type": "text", "text": _question(number)}]
    return GenerationRequest(request_id=f"row-{number}", messages=[{"role": "user", "content": parts}])


if __name__ == "__main__":
    main()
