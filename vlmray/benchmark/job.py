"""The benchmark job: ask several models the same questions, and find out how right and how fast they are.

    config -> plan_benchmark -> Benchmark -> run_benchmark -> Results, report.html, results.json

Models are asked through a server, ours or one that runs, or by the batch pipeline. Either way each model's
answers land in a folder of its own as those of an inference run do, so what was answered is never asked
again, and a run that was killed goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmray import __version__, metrics
from vlmray.benchmark.endpoint import Endpoint, EndpointError, Timed
from vlmray.benchmark.report import EARLIER, Results, SpeedPoint, format_markdown, render_benchmark_html
from vlmray.benchmark.scoreboard import (
    GroupDifference,
    SampleFacts,
    Scoreboard,
    answer_type,
    score_answer,
    score_models,
)
from vlmray.config import BenchmarkConfig, Candidate, InferConfig, ServeConfig
from vlmray.images.decoding import ImageError, image_size
from vlmray.inference import stages
from vlmray.inference.job import check_errors, plan_inference, progress_bar, run_inference
from vlmray.inference.pipeline import InferenceRun
from vlmray.inference.report import group_errors
from vlmray.metrics.significance import paired_difference
from vlmray.reports.page import GalleryItem
from vlmray.schema import GenerationRequest
from vlmray.serving.server import API_KEY, serve_app
from vlmray.storage.run_folder import OutputDirectory

DEFAULT_METRICS = ("exact_match", "anls", "token_f1")

_CHUNK = 32  # rows read, and written, at a time
_SPEED, _RESULTS, _PREDICTIONS = "speed.json", "results.json", "predictions.parquet"
_GALLERY_SIZE = 24


class BenchmarkError(RuntimeError):
    """A run that could not go on; everything answered is in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A run before it starts: everything checked that can be checked without asking a model."""

    config: BenchmarkConfig
    candidates: tuple[Candidate, ...]
    metrics: tuple[str, ...]
    """Names of the metrics, the deciding one first; empty where speed alone is measured."""

    runs: Mapping[str, InferenceRun]
    """What each model is asked and where its answers go, by its name."""

    folder: OutputDirectory
    samples: tuple[SampleFacts, ...]
    baseline: Mapping[str, Mapping[str, Any]] | None
    """Rows of the earlier run by model and sample id."""


def plan_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Open the dataset, the folders and the earlier run, and check all options against them.

    Raises:
        ValueError: an option does not fit the dataset, the models, the folder or the earlier run.
        FileNotFoundError: a model or adapter is not there.
    """
    candidates = config.candidates()
    runs = {candidate.name: _plan(config, candidate) for candidate in candidates}
    first = runs[candidates[0].name]
    names = _metric_names(config, first.spec.metric)
    folder = OutputDirectory.create(config.output_dir, "parquet")
    samples = tuple(_read_facts(first))
    if names and not any(sample.answers for sample in samples):
        raise ValueError(
            f"--dataset_name {config.dataset_name} has no answers to compare with in split "
            f"{config.dataset_split!r}; pass --metrics none to measure speed alone"
        )
    if config.overwrite:
        (Path(folder.uri) / _SPEED).unlink(missing_ok=True)
    baseline = _read_baseline(config.baseline, _describe(config, first, samples)) if config.baseline else None
    return Benchmark(
        config=config, candidates=candidates, metrics=names, runs=runs, folder=folder, samples=samples,
        baseline=baseline,
    )  # fmt: skip


def run_benchmark(benchmark: Benchmark) -> Results:
    """Ask what was not asked yet, measure speed, compare, and write the report.

    Raises:
        ValueError: the server does not serve the models, or an option does not fit the cluster.
        BenchmarkError, InferenceError: the run could not go on.
    """
    started = time.perf_counter()
    config = benchmark.config
    speed = _read_speed(benchmark)
    if config.offline:
        for run in benchmark.runs.values():
            if run.pending:
                run_inference(run)
    else:
        for base, group in _by_base(benchmark).items():
            wanted = [name for name in group if _is_unfinished(benchmark, name, speed)]
            if wanted:
                with _server(benchmark, base, group) as url:
                    asyncio.run(_ask_server(benchmark, url, wanted, speed))
    return _conclude(benchmark, speed, time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------


def _plan(config: BenchmarkConfig, candidate: Candidate) -> InferenceRun:
    options = _shared_options(config, InferConfig)
    primary = _metric_names(config, None)[:1]
    options |= {
        "model_id": candidate.model_id,
        "adapter": candidate.adapter,
        "output_dir": f"{config.output_dir}/{candidate.name}",
        "output_format": "parquet",
        "metric": primary[0] if primary else None,
    }
    return plan_inference(InferConfig(**options), endpoint=config.endpoint)


def _shared_options(config: BenchmarkConfig, config_class: type) -> dict[str, Any]:
    """Return the options that another job has too."""
    theirs = {field.name for field in dataclasses.fields(config_class)}
    mine = {field.name for field in dataclasses.fields(config) if field.init}
    return {name: getattr(config, name) for name in mine & theirs}


def _metric_names(config: BenchmarkConfig, own: str | None) -> tuple[str, ...]:
    """Return the metrics asked for; `own` is the dataset's, which decides where none was asked for."""
    if config.metrics == "none":
        return ()
    if config.metrics is None:
        return tuple(dict.fromkeys([own, *DEFAULT_METRICS])) if own else ()
    names = tuple(dict.fromkeys(name.strip() for name in config.metrics.split(",")))
    known = (*metrics.METRICS, metrics.BLEU)
    for name in names:
        if name not in known:
            raise ValueError(f"--metrics: {name!r} is unknown; known: {', '.join(known)}")
    if names[0] == metrics.BLEU:
        raise ValueError("--metrics: the first one decides, and BLEU says nothing of single answers")
    return names


def _read_facts(run: InferenceRun) -> Iterator[SampleFacts]:
    """Read what each sample is about; images that are alike byte for byte are one image."""
    split = run.config.dataset_split
    for start in range(0, len(run.selected), _CHUNK):
        for row in stages.read_rows(run.source, run.spec, split, run.selected[start : start + _CHUNK]):
            data = row.get("image")
            yield SampleFacts(
                sample_id=row["sample_id"],
                question=row["question"],
                answers=tuple(row["answers"]),
                family=row["family"],
                image=hashlib.sha256(data).hexdigest()[:16] if data else row.get("image_url"),
                num_pixels=_num_pixels(data),
            )


def _num_pixels(image: bytes | None) -> int | None:
    try:
        return None if image is None else math.prod(image_size(image))
    except ImageError:
        return None  # its row says why


def _read_requests(run: InferenceRun, indices: Sequence[int]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Read and prepare rows; yield each with its request, or None where it cannot be asked."""
    for start in range(0, len(indices), _CHUNK):
        chunk = indices[start : start + _CHUNK]
        rows = stages.read_rows(run.source, run.spec, run.config.dataset_split, chunk)
        for row in stages.prepare_rows(rows, run.task, keep_images=False):
            asked = row["error"] is None
            yield row, stages.make_requests([row], run.task)[0] if asked else None


def _by_base(benchmark: Benchmark) -> dict[str, list[str]]:
    """Return the names of the models that one server holds: those that have a base in common."""
    groups: dict[str, list[str]] = {}
    for candidate in benchmark.candidates:
        groups.setdefault("" if benchmark.config.endpoint else candidate.model_id, []).append(candidate.name)
    return groups


@contextlib.contextmanager
def _server(benchmark: Benchmark, base: str, names: Sequence[str]) -> Iterator[str]:
    """Start a server for a base and its adapters, or take the one that was named; yield its address."""
    config = benchmark.config
    if config.endpoint:
        yield config.endpoint
        return
    group = [candidate for candidate in benchmark.candidates if candidate.name in names]
    adapters = [f"{candidate.name}={candidate.adapter}" for candidate in group if candidate.adapter]
    plain = [candidate.name for candidate in group if not candidate.adapter]
    options = _shared_options(config, ServeConfig) | {
        "model_id": base,
        "served_model_name": plain[0] if plain else None,
        "port": _free_port(),
        "adapters": ",".join(adapters) or None,
        "max_adapters": max(1, len(adapters)),
        "max_batch_size": config.batch_size,
        "max_queued_requests": 10 * max(config.most_in_flight, 64),
        "max_new_tokens_limit": max(4096, config.max_new_tokens),
        "drain_timeout_s": 5,
        "log_level": "WARNING",
    }
    server = serve_app(ServeConfig(**options))
    with server:
        yield server.url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------


async def _ask_server(benchmark: Benchmark, url: str, names: Sequence[str], speed: list[SpeedPoint]) -> None:
    """Ask a server all that is left, then measure its speed; what is measured is written at once."""
    key = os.environ.get(API_KEY)
    try:
        async with Endpoint(url, key) as endpoint:
            try:
                served = await endpoint.models()
            except EndpointError as error:
                raise ValueError(f"--endpoint: {error}") from error
            served_as = {name: _served_name(benchmark, name) for name in names}
            for name in served_as.values():
                if name not in served:
                    known = ", ".join(served)
                    raise ValueError(f"--endpoint {url} does not serve {name!r}; it serves {known}")
            for name in names:
                if benchmark.metrics:
                    await _answer(benchmark, endpoint, name, served_as[name])
            for load, name in _to_measure(benchmark, names, speed):
                speed.append(await _measure(benchmark, endpoint, name, served_as[name], load))
                _write_speed(benchmark, speed)
    except EndpointError as error:
        raise BenchmarkError(str(error)) from error


def _served_name(benchmark: Benchmark, name: str) -> str:
    if not benchmark.config.endpoint:
        return name
    return next(candidate.model_id for candidate in benchmark.candidates if candidate.name == name)


async def _answer(benchmark: Benchmark, endpoint: Endpoint, name: str, served: str) -> None:
    """Ask one model what it was not asked yet, and write the answers as they come."""
    run = benchmark.runs[name]
    finished: list[dict[str, Any]] = []
    num_failed = 0
    flying: list[dict[str, Any] | None] = []

    def requests() -> Iterator[GenerationRequest]:
        for row, request in _read_requests(run, run.pending):
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
        check_errors(num_failed, run.config.max_errors)

    with progress_bar(run, name) as bar:
        try:
            async for timed in endpoint.keep_asking(served, requests(), benchmark.config.most_in_flight):
                row = flying[timed.index]
                assert row is not None
                flying[timed.index] = None  # its image is needed no more
                finished.append(stages.score_row(row | stages.answered(timed.completion), run.task))
                if len(finished) >= _CHUNK:
                    save()
        finally:
            save()


async def _measure(
    benchmark: Benchmark, endpoint: Endpoint, name: str, served: str, load: float
) -> SpeedPoint:
    """Measure one model under one load, with streams; the first ones warm up and do not count."""
    config, run = benchmark.config, benchmark.runs[name]
    asked = [request for _, request in _read_requests(run, run.selected[: config.speed_samples]) if request]
    if not asked:
        raise ValueError("--speed_samples: none of the first samples can be asked; see their errors")
    repeats = -(-config.speed_samples // len(asked))
    requests = (asked * repeats)[: config.speed_samples]
    is_rate = config.request_rate is not None

    def ask(requests: Sequence[GenerationRequest]) -> AsyncIterator[Timed]:
        if is_rate:
            return endpoint.ask_at_rate(served, requests, load, seed=config.seed)
        return endpoint.keep_asking(served, requests, int(load), stream=True)

    warm_up = config.most_in_flight if is_rate else int(load)
    async for _ in endpoint.keep_asking(served, (requests * warm_up)[:warm_up], warm_up, stream=True):
        pass
    timed = [answer async for answer in ask(requests)]
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


def _is_unfinished(benchmark: Benchmark, name: str, speed: Sequence[SpeedPoint]) -> bool:
    has_questions = bool(benchmark.metrics and benchmark.runs[name].pending)
    return has_questions or bool(_to_measure(benchmark, [name], speed))


def _to_measure(
    benchmark: Benchmark, names: Sequence[str], speed: Sequence[SpeedPoint]
) -> list[tuple[float, str]]:
    """Return the loads and models of which there is no measurement yet."""
    loads = benchmark.config.loads() if benchmark.config.speed_samples else ()
    done = {(point.load, point.model) for point in speed}
    return [(load, name) for load in loads for name in names if (load, name) not in done]


def _read_speed(benchmark: Benchmark) -> list[SpeedPoint]:
    """Return what an earlier start of this run measured."""
    path = Path(benchmark.folder.uri) / _SPEED
    if benchmark.config.offline or not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["options"] != _speed_options(benchmark.config):
        return []
    return [SpeedPoint.from_json(point) for point in found["points"]]


def _write_speed(benchmark: Benchmark, speed: Sequence[SpeedPoint]) -> None:
    found = {
        "options": _speed_options(benchmark.config),
        "points": [dataclasses.asdict(point) for point in speed],
    }
    benchmark.folder.write_text(_SPEED, json.dumps(found, indent=2) + "\n")


def _speed_options(config: BenchmarkConfig) -> dict[str, Any]:
    names = (
        "models", "endpoint", "concurrency", "request_rate", "speed_samples", "max_new_tokens", "batch_size",
        "num_replicas", "gpus_per_replica", "dataset_name", "dataset_split", "sample_slices",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


# ---------------------------------------------------------------------------------------------
# What came of it
# ---------------------------------------------------------------------------------------------


def _conclude(benchmark: Benchmark, speed: Sequence[SpeedPoint], elapsed_s: float) -> Results:
    """Read the answers back, compare them, and write report and files."""
    config = benchmark.config
    rows = _read_rows(benchmark) if benchmark.metrics else {}
    board = score_models(benchmark.samples, rows, benchmark.metrics) if benchmark.metrics else None
    first = benchmark.runs[benchmark.candidates[0].name]
    results = Results(
        title=f"{', '.join(rows or benchmark.runs)} on {config.dataset_name}",
        models={
            candidate.name: candidate.model_id + (f" + {candidate.adapter}" if candidate.adapter else "")
            for candidate in benchmark.candidates
        },
        board=board,
        against_baseline=_against_baseline(benchmark, rows, board),
        speed=tuple(speed),
        price_per_hour=config.price_per_hour,
        errors={name: group_errors(found.values()) for name, found in rows.items()},
        num_samples=len(benchmark.samples),
        galleries=_galleries(benchmark, rows, board) if board else {},
        elapsed_s=elapsed_s,
        options=dataclasses.asdict(config),
    )
    written = {
        "vlmray": __version__,
        **_describe(config, first, benchmark.samples),
        **results.to_json(),
        "options": dataclasses.asdict(config),
    }
    folder = benchmark.folder
    if rows:
        folder.write_bytes(_PREDICTIONS, _predictions(benchmark, rows))
    folder.write_text("report.md", format_markdown(results) + "\n")
    folder.write_text("report.html", render_benchmark_html(results))
    folder.write_text(_RESULTS, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return results


def _read_rows(benchmark: Benchmark) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the result rows by model and sample id."""
    names = [sample.sample_id for sample in benchmark.samples]
    rows = {}
    for name, run in benchmark.runs.items():
        found = run.folder.read_results(sample_ids=names).to_pylist()
        rows[name] = {row["sample_id"]: row for row in found}
        if len(rows[name]) != len(names):
            raise BenchmarkError(f"{name}: {len(names)} rows in, {len(rows[name])} answers")
    return rows


def _predictions(benchmark: Benchmark, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """Write what every model said to every sample, with all scores, as Parquet."""
    names = [name for name in benchmark.metrics if name != metrics.BLEU]
    table = []
    for model, found in rows.items():
        for sample in benchmark.samples:
            row = found[sample.sample_id]
            scored = row["error"] is None and sample.answers
            table.append(
                {
                    "model": model,
                    "sample_id": sample.sample_id,
                    "question": sample.question,
                    "answers": list(sample.answers),
                    "family": sample.family,
                    "image": sample.image,
                    "num_pixels": sample.num_pixels,
                    "prediction": row["prediction"],
                    "error": row["error"],
                    "num_completion_tokens": row["num_completion_tokens"],
                    **{name: score_answer(name, row, sample) if scored else None for name in names},
                }
            )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(table), sink)
    return bytes(sink.getvalue().to_pybytes())


def _describe(config: BenchmarkConfig, run: InferenceRun, samples: Sequence[SampleFacts]) -> dict[str, Any]:
    """Say what was asked: two runs that say the same can be compared."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.sample_id}\0{sample.question}\0{sample.answers}\0{sample.image}\n".encode())
    return {
        "dataset": {
            "dataset_name": config.dataset_name, "dataset_split": config.dataset_split,
            "num_samples": len(samples), "samples_sha256": digest.hexdigest(),
        },
        "prompt": {
            "prompt_template": run.task.prompt_template, "system_prompt": run.task.system_prompt,
            "max_new_tokens": config.max_new_tokens, "temperature": config.temperature,
        },
    }  # fmt: skip


def _read_baseline(path: str, now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read an earlier run's answers.

    Raises:
        ValueError: it is not there, or asked something else.
    """
    file = Path(path).expanduser()
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        rows = pq.read_table(file.parent / _PREDICTIONS).to_pylist()
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise ValueError(f"--baseline {path}: {error}; pass the results.json of a finished run") from error
    for part in ("dataset", "prompt"):
        for name, value in now[part].items():
            before = then.get(part, {}).get(name)
            if before != value and name != "dataset_name":  # the same samples may have moved
                raise ValueError(
                    f"--baseline {path} is not comparable: its {name} was {before!r} and is {value!r} now"
                )
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["sample_id"]] = row
    return found


def _against_baseline(
    benchmark: Benchmark, rows: Mapping[str, Any], board: Scoreboard | None
) -> dict[str, GroupDifference]:
    """Compare each model with the one of its name in the earlier run, by the deciding metric."""
    if board is None or benchmark.baseline is None:
        return {}
    metric = board.metrics[0]
    samples = [sample for sample in benchmark.samples if sample.answers]
    found = {}
    for name in board.models:
        if name in benchmark.baseline:
            before, after = (
                [score_answer(metric, answers[sample.sample_id], sample) for sample in samples]
                for answers in (benchmark.baseline[name], rows[name])
            )
            difference = paired_difference(before, after, [sample.image_key for sample in samples])
            found[name] = GroupDifference(
                model=name, base=EARLIER, metric=metric, kind="all", group="all", difference=difference,
                p_corrected=difference.p_value,
            )  # fmt: skip
    return found


def _galleries(benchmark: Benchmark, rows: Mapping[str, Any], board: Scoreboard) -> dict[str, Any]:
    """Choose samples that the first model and the second answer differently, or both wrong."""
    metric = board.metrics[0]
    base, *others = board.models
    other = others[0] if others else base
    chosen: dict[str, list[SampleFacts]] = {"fixed": [], "broken": [], "both wrong": []}
    for sample in benchmark.samples:
        if not sample.answers:
            continue
        before, after = (
            score_answer(metric, rows[model][sample.sample_id], sample) for model in (base, other)
        )
        kind = "fixed" if after > before else "broken" if after < before else "both wrong"
        if kind != "both wrong" or after < 1:
            chosen[kind].append(sample)
    if not others:
        chosen = {"wrong": chosen["both wrong"]}
    run = benchmark.runs[base]
    return {
        kind: (len(found), [_card(run, sample, rows, board, other) for sample in _spread(found)])
        for kind, found in chosen.items()
    }


def _spread(samples: Sequence[SampleFacts]) -> list[SampleFacts]:
    """Take evenly spaced ones, so that all parts of the dataset are seen."""
    step = max(1.0, len(samples) / _GALLERY_SIZE)
    return [samples[int(place * step)] for place in range(min(len(samples), _GALLERY_SIZE))]


def _card(
    run: InferenceRun, sample: SampleFacts, rows: Mapping[str, Any], board: Scoreboard, shown: str
) -> GalleryItem:
    row = rows[shown][sample.sample_id]
    (source_row,) = stages.read_rows(run.source, run.spec, run.config.dataset_split, [row["row_index"]])
    others = [name for name in board.models if name != shown]
    return GalleryItem(
        sample_id=sample.sample_id,
        question=sample.question,
        answers=sample.answers,
        prediction=row["prediction"],
        score=None if row["error"] else score_answer(board.metrics[0], row, sample),
        error=row["error"],
        family=sample.family or answer_type(sample.answers),
        image=source_row.get("image"),
        beside=tuple((name, rows[name][sample.sample_id]["prediction"] or "(failed)") for name in others),
    )
