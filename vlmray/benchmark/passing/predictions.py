"""What several models answered as a dataset on the hub, with scores and verdicts on its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmray import __version__
from vlmray.benchmark.baseline import PREDICTIONS
from vlmray.benchmark.plan import Benchmark
from vlmray.benchmark.report import format_markdown
from vlmray.benchmark.suite.report import format_suite_markdown
from vlmray.benchmark.suite.verdict import SuiteResults
from vlmray.benchmark.verdicts import Results
from vlmray.config import BenchmarkConfig
from vlmray.inference.passing.predictions import (
    CARD,
    dataset_facts,
    dataset_head,
    prompt_facts,
    versions,
    without_paths,
)
from vlmray.publishing.cards import Facts, command_of, write_card
from vlmray.publishing.hub import HubRepo
from vlmray.publishing.private import public_value

_MESSAGE = f"Predictions by vlmray {__version__}"


def push_benchmark(benchmark: Benchmark, repo: HubRepo, results: Results) -> None:
    """Push the predictions of a comparison.

    Raises:
        PushError: The hub did not take them.
    """
    sections = {"Scores": format_markdown(results), **_sections(benchmark)}
    card = _card(benchmark.config, [*results.models], {"default": benchmark}, sections)
    repo.push({PREDICTIONS: _predictions(benchmark), CARD: card.encode()}, _MESSAGE)


def push_suite(
    config: BenchmarkConfig, planned: Mapping[str, Benchmark], repo: HubRepo, results: SuiteResults
) -> None:
    """Push the predictions of several comparisons, each as a configuration of one dataset.

    Raises:
        PushError: The hub did not take them.
    """
    sections: dict[str, str | Facts] = {"Verdicts": format_suite_markdown(results)}
    for name, benchmark in planned.items():
        sections[f"Scores, {name}"] = format_markdown(results.results[name])
        sections |= {f"{title}, {name}": section for title, section in _sections(benchmark).items()}
    card = _card(config, results.models, planned, sections)
    files = {f"{name}/{PREDICTIONS}": _predictions(each) for name, each in planned.items()}
    repo.push({**files, CARD: card.encode()}, _MESSAGE)


def _sections(benchmark: Benchmark) -> dict[str, str | Facts]:
    run = benchmark.runs[benchmark.candidates[0].name]
    return {"Data": dataset_facts(run, len(benchmark.samples)), "Prompt": prompt_facts(run)}


def _card(
    config: BenchmarkConfig,
    models: list[str],
    planned: Mapping[str, Benchmark],
    sections: Mapping[str, str | Facts],
) -> str:
    first = next(iter(planned.values()))
    asked = {
        name: str(_sections(each)["Data"]["dataset"])  # type: ignore[index]
        for name, each in planned.items()
    }
    files = {
        name: (each.config.dataset_split, PREDICTIONS if name == "default" else f"{name}/{PREDICTIONS}")
        for name, each in planned.items()
    }
    num_rows = sum(len(each.samples) for each in planned.values()) * len(models)
    stands_for = {
        each.name: str(public_value(each.model_id))
        + (f" + {public_value(each.adapter)}" if each.adapter else "")
        for each in first.candidates
    }
    return write_card(
        dataset_head(first.config.dataset_name, num_rows, files),
        f"Answers of {', '.join(models)} to {', '.join(asked.values())}",
        f"{num_rows:,} rows, one for each sample and model, with every score, by vlmray {__version__}. "
        "Intervals are 95 %, by bootstrap over images.",
        {
            "Models": {**stands_for, "engine": first.config.answering_engine},
            **sections,
            "Versions": versions(first.config.answering_engine),
            "Command": command_of("benchmark", config),
        },
    )


def _predictions(benchmark: Benchmark) -> bytes:
    """Return what was written, without paths of this machine."""
    table = without_paths(pq.read_table(Path(benchmark.folder.uri) / PREDICTIONS))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())
