"""How fast a model answers under a load."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmray.benchmark.clients import Clients, Timed
from vlmray.benchmark.plan import SPEED, Benchmark, BenchmarkError
from vlmray.benchmark.samples import read_requests
from vlmray.config import BenchmarkConfig, options_that_affect
from vlmray.errors import OptionError
from vlmray.schema import GenerationRequest
from vlmray.storage.run_options import changed_options


async def measure_speed(
    benchmark: Benchmark, clients: Clients, served_as: Mapping[str, str], speed: list[SpeedPoint]
) -> None:
    """Measure what was not measured yet, all with the same questions; each point is written at once.

    Args:
        benchmark: The run.
        clients: Ask the server.
        served_as: Names by which the server knows the models that it has, by their names in the run.
        speed: What was measured; gets what is measured.
    """
    left = to_measure(benchmark, list(served_as), speed)
    requests = {name: _make_requests(benchmark, name) for name in {name for _, name in left}}
    for load, name in left:
        speed.append(await _measure(benchmark.config, clients, name, served_as[name], requests[name], load))
        write_speed(benchmark, speed)


def _make_requests(benchmark: Benchmark, name: str) -> list[GenerationRequest]:
    """Make a model's requests of the first samples, over again where too few of them can be asked."""
    config, run = benchmark.config, benchmark.runs[name]
    rows = read_requests(run, run.selected[: config.speed_samples])
    asked = [request for _, draws in rows for request in draws[:1]]
    if not asked:
        raise OptionError("speed_samples", ": none of the first samples can be asked", "see their errors")
    repeats = -(-config.speed_samples // len(asked))
    plain = [dataclasses.replace(request, num_logprobs=None) for request in asked]
    return (plain * repeats)[: config.speed_samples]


async def _measure(
    config: BenchmarkConfig,
    clients: Clients,
    name: str,
    served: str,
    requests: list[GenerationRequest],
    load: float,
) -> SpeedPoint:
    """Measure one model under one load, with streams; the first ones warm up and do not count."""
    is_rate = config.request_rate is not None

    def ask() -> AsyncIterator[Timed]:
        if is_rate:
            return clients.ask_at_rate(served, requests, load, seed=config.seed)
        return clients.keep_asking(served, requests, int(load), stream=True)

    warm_up = config.most_in_flight if is_rate else int(load)
    async for _ in clients.keep_asking(served, (requests * warm_up)[:warm_up], warm_up, stream=True):
        pass
    timed = [answer async for answer in ask()]
    answers = [answer for answer in timed if answer.completion.error is None]
    if not answers:
        raise BenchmarkError(f"{name} answers nothing: {timed[0].completion.error}")
    end = max(answer.started_s + answer.latency_s for answer in timed)
    elapsed_s = end - min(answer.started_s for answer in timed)
    ttft_ms = [1000 * answer.ttft_s for answer in answers if answer.ttft_s is not None]
    latency_ms = [1000 * answer.latency_s for answer in answers]
    num_tokens = sum(answer.completion.num_completion_tokens for answer in answers)
    return SpeedPoint(
        model=name,
        load=load,
        kind="requests/s offered" if is_rate else "requests in flight",
        num_requests=len(timed),
        num_failed=len(timed) - len(answers),
        requests_per_s=len(answers) / elapsed_s,
        tokens_per_s=num_tokens / elapsed_s,
        ttft_ms=_percentiles(ttft_ms),
        latency_ms=_percentiles(latency_ms),
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return p50, p90 and p99."""
    if not values:
        return None
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[89], cuts[98]


def to_measure(
    benchmark: Benchmark, names: Sequence[str], speed: Sequence[SpeedPoint]
) -> list[tuple[float, str]]:
    """Return the loads and models of which there is no measurement yet."""
    loads = benchmark.config.loads() if benchmark.config.speed_samples else ()
    done = {(point.load, point.model) for point in speed}
    return [(load, name) for load in loads for name in names if (load, name) not in done]


def read_speed(benchmark: Benchmark) -> list[SpeedPoint]:
    """Return what an earlier start of this run measured."""
    if benchmark.config.offline:
        return []
    found = benchmark.folder.read_json(SPEED, cure="delete it to have speed measured again")
    if found is None or changed_options(found["options"], _speed_options(benchmark)):
        return []
    return [SpeedPoint.from_json(point) for point in found["points"]]


def write_speed(benchmark: Benchmark, speed: Sequence[SpeedPoint]) -> None:
    """Write what was measured so far, with the options that it depends on."""
    found = {
        "options": _speed_options(benchmark),
        "points": [dataclasses.asdict(point) for point in speed],
    }
    benchmark.folder.write_json(SPEED, found)


def _speed_options(benchmark: Benchmark) -> dict[str, Any]:
    """Return what was measured: what stands behind the names counts too."""
    runs = benchmark.runs
    return {
        **options_that_affect(benchmark.config, "result", "derived", "rows", "speed"),
        "fingerprints": {name: run.model.fingerprints for name, run in runs.items()},
        "dataset_fingerprint": runs[benchmark.candidates[0].name].source.fingerprint(),
    }


Percentiles = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPoint:
    """One model under one load."""

    model: str
    load: float
    kind: str
    """What the load counts: requests in flight, or requests per second offered."""

    num_requests: int
    num_failed: int
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: Percentiles | None
    """p50, p90 and p99 of the time to the first text; None where no answer had any."""

    latency_ms: Percentiles | None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SpeedPoint:
        """Read one back."""
        percentiles = {
            name: tuple(values[name]) if values[name] else None for name in ("ttft_ms", "latency_ms")
        }
        return cls(**{**values, **percentiles})
