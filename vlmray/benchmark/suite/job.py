"""Compare models on several datasets, one after the other, and say what came of all."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping

from vlmray import __version__
from vlmray.benchmark.job import run_benchmark
from vlmray.benchmark.passing.figures import suite_figures
from vlmray.benchmark.passing.predictions import push_suite
from vlmray.benchmark.plan import RESULTS, Benchmark, choose_engines, plan_benchmark
from vlmray.benchmark.suite.datasets import read_datasets
from vlmray.benchmark.suite.report import format_suite_markdown, render_suite_html
from vlmray.benchmark.suite.verdict import SuiteResults, find
from vlmray.config import BenchmarkConfig
from vlmray.publishing.hub import HubRepo
from vlmray.publishing.trackers import check_tracker, report_figures
from vlmray.storage.run_folder import RunFolder


def plan_suite(config: BenchmarkConfig) -> dict[str, Benchmark]:
    """Check the benchmark of every dataset before the first one is asked.

    Raises:
        ValueError: the file is not what it should be, or an option does not fit a dataset or model.
        FileNotFoundError: a model or adapter is not there.
    """
    RunFolder.find(config.output_dir, "benchmark")
    check_tracker(config.report_to)
    HubRepo.of(config, "dataset")
    configs = read_datasets(config)
    choices = choose_engines([*configs.values()])
    return {name: plan_benchmark(each, choices) for name, each in configs.items()}


def run_suite(config: BenchmarkConfig, planned: Mapping[str, Benchmark]) -> SuiteResults:
    """Ask what was not asked yet of every dataset, compare, and write the reports.

    Raises:
        ValueError: the server does not serve the models, or an option does not fit the cluster.
        BenchmarkError, InferenceError: the run could not go on.
        PushError, TrackerError: the hub, or a tracker, did not take what is written.
    """
    started = time.perf_counter()
    results = {name: run_benchmark(benchmark) for name, benchmark in planned.items()}
    engine = next(iter(planned.values())).config.engine
    options = dataclasses.asdict(config) | {"engine": engine}
    suite = SuiteResults(
        results=results, findings=find(results), elapsed_s=time.perf_counter() - started, options=options
    )
    folder = RunFolder.create(config.output_dir)
    folder.write_text("report.md", format_suite_markdown(suite) + "\n")
    folder.write_text("report.html", render_suite_html(suite))
    written = {"vlmray": __version__, **suite.to_json(), "options": options}
    folder.write_text(RESULTS, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    if repo := HubRepo.of(config, "dataset"):
        push_suite(config, planned, repo, suite)
    report_figures(config.report_to, suite_figures(config, suite))
    return suite
