"""Ask models through a server, until every sample has its answer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

from vlmray.benchmark.clients import Clients
from vlmray.benchmark.plan import Benchmark
from vlmray.benchmark.samples import CHUNK, read_requests
from vlmray.config import ServeConfig, known_options, shared_options
from vlmray.inference import stages
from vlmray.reports.bar import write_above_bar
from vlmray.schema import GenerationRequest, Row
from vlmray.serving.server import serve_app


@contextlib.contextmanager
def started_server(benchmark: Benchmark, base: str, names: Sequence[str]) -> Iterator[str]:
    """Start a server for a base and its adapters, or take the one that was named; yield its address."""
    config = benchmark.config
    if config.endpoint:
        yield config.endpoint
        return
    group = [candidate for candidate in benchmark.candidates if candidate.name in names]
    adapters = [f"{candidate.name}={candidate.adapter}" for candidate in group if candidate.adapter]
    plain = [candidate.name for candidate in group if not candidate.adapter]
    options = shared_options(config, ServeConfig) | {
        "model_id": base,
        "served_model_name": plain[0] if plain else None,
        "port": free_port(),
        "adapters": ",".join(adapters) or None,
        "verify_adapter": config.verify_adapter and bool(adapters),
        "max_adapters": max(1, len(adapters)),
        "max_batch_size": config.batch_size,
        "max_queued_requests": 10 * max(config.most_in_flight, 64),
        "max_new_tokens_limit": max(4096, config.max_new_tokens),
        "drain_timeout_s": 5,
        "log_level": "WARNING",
    }
    server = serve_app(ServeConfig(**known_options(ServeConfig, options, config.engine)))
    with server:
        yield server.url


def free_port() -> int:
    """Return a port of this machine that nothing listens on yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def served_name(benchmark: Benchmark, name: str) -> str:
    """Return the name by which a server knows a model; a base has one, under however many it is compared."""
    asked = next(candidate for candidate in benchmark.candidates if candidate.name == name)
    if benchmark.config.endpoint:
        return asked.model_id
    same = (each for each in benchmark.candidates if each.model_id == asked.model_id)
    return name if asked.adapter else next(each.name for each in same if not each.adapter)


async def answer_pending(benchmark: Benchmark, clients: Clients, name: str, served: str) -> None:
    """Ask one model what it was not asked yet, and write the answers as they come."""
    run = benchmark.runs[name]
    finished: list[Row] = []
    num_failed = 0
    flying: list[Row | None] = []

    def requests() -> Iterator[GenerationRequest]:
        for row, request in read_requests(run, run.pending):
            if request is None:
                finished.append(stages.score_row(row, run.task))
            else:
                flying.append(row)
                yield request

    def save() -> None:
        nonlocal num_failed
        bar.update(len(finished))
        num_failed += sum(row["error"] is not None for row in finished)
        bar.set_postfix(failed=num_failed, refresh=False)
        if finished:
            stages.save_rows(finished, run.folder)
        finished.clear()
        run.check_errors(num_failed)

    with run.open_bar(name) as bar:
        try:
            most = benchmark.config.max_in_flight or benchmark.config.most_in_flight
            async for timed in clients.answer_all(served, requests(), most, write_above_bar):
                row = flying[timed.index]
                assert row is not None
                flying[timed.index] = None  # its image is needed no more
                finished.append(stages.score_row(row | stages.answered(timed.completion), run.task))
                if len(finished) >= CHUNK:
                    save()
        finally:
            save()
