"""Ask models through a server, until every sample has its answer."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from vlmray.benchmark.clients import Clients
from vlmray.benchmark.plan import Benchmark
from vlmray.benchmark.samples import CHUNK, read_requests
from vlmray.config import BenchmarkConfig, ServeConfig, known_options, shared_options
from vlmray.inference import stages
from vlmray.inference.chunks import Reuse
from vlmray.inference.drawing.voting import RowsInFlight
from vlmray.inference.plan import InferenceRun
from vlmray.inference.reuse.keeping import served_answers
from vlmray.inference.reuse.singly import AskedOnce
from vlmray.reports.bar import write_above_bar
from vlmray.schema import GenerationRequest, Row
from vlmray.serving.server import serve_app

logger = logging.getLogger(__name__)


def servers(benchmark: Benchmark) -> list[list[str]]:
    """Return the names of the models that one server holds: of a base, loaded with the same options."""
    groups: dict[str, list[str]] = {}
    for candidate in benchmark.candidates:
        options = _loaded_with(benchmark.configs[candidate.name], candidate.model_id)
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(candidate.name)
    return [*groups.values()]


def _loaded_with(config: BenchmarkConfig, base: str) -> dict[str, Any]:
    """Return what models need to be the same in to share a server: one of ours loads them so."""
    if config.endpoint:
        names = ("endpoint", "endpoint_timeout_s", "min_pixels", "max_pixels")
        return {name: getattr(config, name) for name in names}
    options = shared_options(config, ServeConfig) | {"model_id": base, "max_batch_size": config.batch_size}
    return {name: options[name] for name in options.keys() - {"max_new_tokens", "verify_adapter"}}


@contextlib.contextmanager
def started_server(benchmark: Benchmark, names: Sequence[str]) -> Iterator[str]:
    """Start a server for a base and its adapters, or take the one that was named; yield its address."""
    configs = [benchmark.configs[name] for name in names]
    config = configs[0]
    if config.endpoint:
        yield config.endpoint
        return
    group = [candidate for candidate in benchmark.candidates if candidate.name in names]
    adapters = [f"{candidate.name}={candidate.adapter}" for candidate in group if candidate.adapter]
    plain = [candidate.name for candidate in group if not candidate.adapter]
    options = _loaded_with(config, group[0].model_id) | {
        "served_model_name": plain[0] if plain else None,
        "port": free_port(),
        "adapters": ",".join(adapters) or None,
        "verify_adapter": benchmark.config.verify_adapter and bool(adapters),
        "max_adapters": max(1, len(adapters)),
        "max_queued_requests": 10 * max(config.most_in_flight, 64),
        "max_new_tokens_limit": max(4096, *(each.max_new_tokens for each in configs)),
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


def served_name(benchmark: Benchmark, name: str, group: Sequence[str]) -> str:
    """Return the name by which its server knows a model; a base has one, however many are compared."""
    candidates = {candidate.name: candidate for candidate in benchmark.candidates}
    if benchmark.configs[name].endpoint:
        return candidates[name].model_id
    return name if candidates[name].adapter else next(each for each in group if not candidates[each].adapter)


async def answer_pending(benchmark: Benchmark, clients: Clients, name: str, served: str) -> None:
    """Ask one model what it was not asked yet, and write the answers as they come."""
    run, config = benchmark.runs[name], benchmark.configs[name]
    known = served_answers(run)
    once = AskedOnce(functools.partial(stages.row_key, task=run.task), known)
    flying = RowsInFlight(run.task.num_samples)

    def requests() -> Iterator[GenerationRequest]:
        for row, draws in read_requests(run, run.pending):
            ready = once.add(row) if draws else [row]
            if ready is None:
                flying.begin(row)
                yield from draws
            else:
                writer.take(ready)

    with run.open_bar(name) as bar:
        writer = _Writer(run, once, bar)
        try:
            most = config.max_in_flight or config.most_in_flight
            async for timed in clients.answer_all(served, requests(), most, write_above_bar):
                if (ended := flying.end(timed.index, timed.completion)) is not None:
                    row, drawn = ended
                    writer.take(once.answered(row | stages.answered(*drawn)))
        finally:
            writer.save()
    say_taken_over(name, once.reuse)
    if known is not None and (problems := known.problems()):
        logger.warning("%s", problems)


class _Writer:
    """Scores rows and writes them, a few at a time."""

    def __init__(self, run: InferenceRun, once: AskedOnce, bar: tqdm[Any]) -> None:
        self._run, self._once, self._bar = run, once, bar
        self._finished: list[Row] = []
        self._num_failed = 0

    def take(self, rows: Sequence[Row]) -> None:
        """Score rows that are answered, or failed, and write them once there are some."""
        self._finished += (stages.score_row(row, self._run.task) for row in rows)
        if len(self._finished) >= CHUNK:
            self.save()

    def save(self) -> None:
        """Write what there is."""
        self._bar.update(len(self._finished))
        self._num_failed += sum(row["error"] is not None for row in self._finished)
        self._bar.set_postfix(failed=self._num_failed, refresh=False)
        self._once.keep()
        if self._finished:
            stages.save_rows(self._finished, self._run.folder)
        self._finished.clear()
        self._run.check_errors(self._num_failed)


def say_taken_over(name: str, reuse: Reuse) -> None:
    """Say of how many samples a model was not asked."""
    if any(reuse):
        logger.info(
            "%s: %d answers were taken over from samples that ask the same, %d from the answer cache",
            name, *reuse,
        )  # fmt: skip
