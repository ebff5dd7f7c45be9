"""The benchmark job: ask several models the same questions, and find out how right and how fast they are.

    config -> plan_benchmark -> Benchmark -> run_benchmark -> Results, report.html, results.json

Models are asked through a server, ours or one that runs, or by the batch pipeline. Either way each model's
answers land in a folder of its own as those of an inference run do, so what was answered is never asked
again, and a run that was killed goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from vlmray.benchmark.asking import answer_pending, say_taken_over, served_name, servers, started_server
from vlmray.benchmark.clients import Clients
from vlmray.benchmark.gathering import conclude
from vlmray.benchmark.passing.figures import benchmark_figures
from vlmray.benchmark.passing.predictions import push_benchmark
from vlmray.benchmark.plan import Benchmark, BenchmarkError
from vlmray.benchmark.speed import SpeedPoint, measure_speed, read_speed, to_measure
from vlmray.benchmark.verdicts import Results
from vlmray.engines.openai.client import EndpointError, api_key
from vlmray.engines.openai.images import PixelBounds
from vlmray.errors import OptionError
from vlmray.inference.chunks import Reuse
from vlmray.inference.job import run_inference
from vlmray.publishing.trackers import report_figures


def run_benchmark(benchmark: Benchmark) -> Results:
    """Ask what was not asked yet, measure speed, compare, write the report, and push what is to be pushed.

    Raises:
        ValueError: the server does not serve the models, or an option does not fit the cluster.
        BenchmarkError, InferenceError: the run could not go on.
        PushError, TrackerError: the hub, or a tracker, did not take what is written.
    """
    started = time.perf_counter()
    config = benchmark.config
    speed = read_speed(benchmark)
    if config.offline:
        for name, run in benchmark.runs.items():
            if run.pending:
                summary = run_inference(run)
                say_taken_over(name, Reuse(summary.num_identical, summary.num_from_cache))
    else:
        for group in servers(benchmark):
            if any(_is_unfinished(benchmark, name, speed) for name in group):
                with started_server(benchmark, group) as url:
                    asyncio.run(_ask_server(benchmark, url, group, speed))
    results = conclude(benchmark, speed, time.perf_counter() - started)
    if benchmark.repo:
        push_benchmark(benchmark, benchmark.repo, results)
    report_figures(config.report_to, benchmark_figures(config, results))
    return results


# ---------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------


async def _ask_server(benchmark: Benchmark, url: str, group: Sequence[str], speed: list[SpeedPoint]) -> None:
    """Ask a server all that is left of the models it holds, then measure its speed."""
    config = benchmark.configs[group[0]]
    names = [name for name in group if _is_unfinished(benchmark, name, speed)]
    bounds = PixelBounds(least=config.min_pixels, most=config.max_pixels) if config.endpoint else None
    try:
        async with Clients(url, api_key(url), timeout_s=config.endpoint_timeout_s, bounds=bounds) as clients:
            served_as = {name: served_name(benchmark, name, group) for name in names}
            try:
                await clients.check_served(served_as.values())
            except EndpointError as error:
                raise OptionError("endpoint", f": {error}") from error
            for name in names:
                if benchmark.metrics:
                    await answer_pending(benchmark, clients, name, served_as[name])
            await measure_speed(benchmark, clients, served_as, speed)
    except EndpointError as error:
        raise BenchmarkError(str(error)) from error


def _is_unfinished(benchmark: Benchmark, name: str, speed: Sequence[SpeedPoint]) -> bool:
    has_questions = bool(benchmark.metrics and benchmark.runs[name].pending)
    return has_questions or bool(to_measure(benchmark, [name], speed))
