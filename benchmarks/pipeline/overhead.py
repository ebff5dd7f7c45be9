"""What the pipeline costs on top of the engine: the same requests through both, in one process lifetime.

    python -m benchmarks.pipeline.overhead --model_id tiny-random --num_rows 512 --repeats 3

Rows lie in a Parquet file, so neither side draws charts. The bare engine gets requests that are ready, images
encoded in memory; the pipeline reads, decodes, generates, scores and writes files and Parquet. Both rates
are steady ones, over all but the first third of the rows: model loading, Ray's start and the chunks that
pile up while its workers start are not counted. Sides alternate, so a slow spell hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.charts import write_charts
from vlmray import cluster
from vlmray.config import InferConfig
from vlmray.dataset.rows import read_chunk
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.inference import stages
from vlmray.inference.pipeline import iter_finished
from vlmray.inference.plan import InferenceRun, plan_inference
from vlmray.schema import GenerationRequest

ROWS_PER_CALL = 64


def main() -> None:
    """Measure both sides and print a table and one JSON line."""
    options = parse_options()
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        data = options.dataset_name or write_charts(Path(folder) / "test.parquet", options.num_rows)
        replicas = cluster.plan_replicas(None, None)
        engine = build_engine(
            engine="transformers", model_id=options.model_id, batch_size=options.batch_size,
            num_threads=replicas.num_threads,
        )  # fmt: skip
        plan = plan_run(options, data, f"{folder}/plan")
        requests = read_requests(plan)
        rates: dict[str, list[float]] = {"bare engine": [], "pipeline": []}
        for repeat in range(options.repeats):
            rates["bare engine"].append(measure_engine(engine, requests))
            run = plan_run(options, data, f"{folder}/{repeat}")
            rates["pipeline"].append(measure_pipeline(run, replicas))
    print_table(rates, options.num_rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default="tiny-random")
    parser.add_argument("--dataset_name", help="default: charts, drawn beforehand")
    parser.add_argument("--num_rows", type=int, default=512)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def plan_run(options: argparse.Namespace, data: str, output_dir: str) -> InferenceRun:
    return plan_inference(
        InferConfig(
            model_id=options.model_id, dataset_name=data, sample_slices=f"[:{options.num_rows}]",
            output_dir=output_dir, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size,
        )
    )  # fmt: skip


def read_requests(run: InferenceRun) -> list[GenerationRequest]:
    rows = read_chunk(run.source, run.spec, "test", run.pending, 0, len(run.pending))
    return stages.make_requests(stages.prepare_rows(rows, run.task), run.task)


def measure_engine(
    engine: Engine, requests: Sequence[GenerationRequest], rows_per_call: int = ROWS_PER_CALL
) -> float:
    """Return the steady rate in samples per second."""
    finished = []
    for start in range(0, len(requests), rows_per_call):
        call = requests[start : start + rows_per_call]
        engine.generate(call)
        finished.append((time.perf_counter(), len(call)))
    return steady_rate(finished)


def measure_pipeline(run: InferenceRun, replicas: cluster.ReplicaPlan) -> float:
    """Return the steady rate in samples per second."""
    return steady_rate([(time.perf_counter(), chunk.num_rows) for chunk in iter_finished(run, replicas)])


def steady_rate(finished: Sequence[tuple[float, int]]) -> float:
    """Return rows per second from (time, rows) of finished chunks, after the first third of them."""
    first = max(1, len(finished) // 3)
    return sum(rows for _, rows in finished[first:]) / (finished[-1][0] - finished[first - 1][0])


def print_table(rates: dict[str, list[float]], num_rows: int) -> None:
    ratios = [piped / bare for bare, piped in zip(*rates.values(), strict=True)]
    print(f"{num_rows} rows, {len(ratios)} repeats\n\n{'':12} {'median':>9} {'lowest':>9} {'highest':>9}")
    for name, values in {**{f"{n} /s": v for n, v in rates.items()}, "ratio": ratios}.items():
        print(f"{name:14} {statistics.median(values):9.3g} {min(values):9.3g} {max(values):9.3g}")
    print(json.dumps({"num_rows": num_rows, "samples_per_s": rates, "ratio": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
