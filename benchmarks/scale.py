"""How far one driver reaches: rows a second, memory and resuming as rows and replicas grow.

    python -m benchmarks.scale --num_rows 10000 1000000 --num_replicas 1 16

The whole job runs with the fake engine, over generated rows in a Parquet file: questions alone, or with an
image of 8 x 8 pixels each (`--images`). Sizes are answered by one replica without latency, which shows what
everything but the model costs. Replicas are compared at `--rows_per_replica` rows each, whose answers take
`--latency_s`; GPUs are nominal. Rates are steady ones, over all but the first fifth of the rows, by when
parts were written: starting Ray and its workers is not counted. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from vlmray.config import InferConfig
from vlmray.inference.job import run_inference
from vlmray.inference.plan import plan_inference

_ROWS_PER_GROUP = 1024
_MIB = 2**20


def main() -> None:
    """Run each size and each number of replicas, and print tables and one JSON line."""
    options = parse_options()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = [
            run_child(options, folder, num_rows, num_replicas=1, latency_s=0) for num_rows in options.num_rows
        ]
        replicas = [
            run_child(options, folder, number * options.rows_per_replica, number, options.latency_s)
            for number in options.num_replicas
        ]
    report(options, sizes, replicas)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num_rows", type=int, nargs="*", default=[2000, 10000])
    parser.add_argument("--num_replicas", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--rows_per_replica", type=int, default=400)
    parser.add_argument("--latency_s", type=float, default=0.02)
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--output_format", default="parquet", choices=["files", "parquet", "both"])
    parser.add_argument("--folder", help="where rows and results lie meanwhile")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(options: argparse.Namespace, sizes: list[dict[str, Any]], replicas: list[dict[str, Any]]) -> None:
    """Print both tables, and one JSON line."""
    for run in replicas:
        of_one = [each["rows_per_s"] / each["num_replicas"] for each in (run, replicas[0])]
        run["efficiency"] = of_one[0] / of_one[1]
    columns = ("num_rows", "num_replicas", "rows_per_s", "elapsed_s", "driver_peak_mib", "worker_peak_mib",
               "driver_cpu_s_per_1000", "resume_s", "efficiency")  # fmt: skip
    print(*(f"{name:>{max(9, len(name))}}" for name in columns))
    for run in [*sizes, *replicas]:
        print(*(f"{run.get(name, ''):>{max(9, len(name))}.4g}" if name in run else "" for name in columns))
    growth = sizes[-1]["driver_peak_mib"] / sizes[0]["driver_peak_mib"] if sizes else None
    if growth:
        print(f"driver peak, longest over shortest: {growth:.2f}")
    figures = {"sizes": sizes, "replicas": replicas, "driver_growth": growth}
    print(json.dumps({"options": vars(options), **figures}))


def run_child(
    options: argparse.Namespace, folder: str, num_rows: int, num_replicas: int, latency_s: float
) -> dict[str, Any]:
    """Answer so many rows in a process, and resume the finished folder in another one."""
    data = Path(folder) / f"rows-{num_rows}.parquet"
    if not data.exists():
        write_rows(data, num_rows, images=options.images)
    asked = {
        "data": data.as_uri(), "output_dir": f"{folder}/{num_rows}-{num_replicas}-{latency_s}",
        "num_replicas": num_replicas, "latency_s": latency_s, "output_format": options.output_format,
    }  # fmt: skip
    found, again = (_call(asked) for _ in range(2))
    assert found["num_new"] == num_rows
    assert again["num_new"] == 0
    return {
        **asked, **found, "resume_s": again["elapsed_s"], "resume_peak_mib": again["driver_peak_mib"],
        "rows_per_s": steady_rate(Path(asked["output_dir"])), "num_rows": num_rows,
    }  # fmt: skip


def _call(asked: dict[str, Any]) -> dict[str, Any]:
    child = [sys.executable, "-m", "benchmarks.scale", "--child", json.dumps(asked)]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_rows(path: Path, num_rows: int, *, images: bool) -> None:
    """Write rows of questions and answers, a group at a time."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    kinds = {"question": pa.string(), "answer": pa.string(), "family": pa.string()}
    if images:
        kinds["image"] = pa.binary()
    with pq.ParquetWriter(path, pa.schema(kinds)) as writer:
        for start in range(0, num_rows, _ROWS_PER_GROUP):
            rows = [
                {"question": f"What is the number of row {row}?", "answer": str(row % 7),
                 "family": "odd" if row % 2 else "even", "image": buffer.getvalue() + f"{row // 2}".encode()}
                for row in range(start, min(num_rows, start + _ROWS_PER_GROUP))
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, pa.schema(kinds)))


def measure(
    *, data: str, output_dir: str, num_replicas: int, latency_s: float, output_format: str
) -> dict[str, Any]:
    """Run the job in this process and return its figures."""
    config = InferConfig(
        engine="fake", model_id=f"fake?answer=3&latency_s={latency_s}", dataset_name=data,
        sample_slices="[:]", output_dir=output_dir, output_format=output_format,
        num_replicas=str(num_replicas), gpus_per_replica=0 if num_replicas == 1 else 1, max_errors=0,
        log_level="WARNING",
    )  # type: ignore[arg-type]  # fmt: skip
    started, cpu_started = time.perf_counter(), time.process_time()
    run = plan_inference(config)
    with watched_workers() as peaks:
        if run.pending:
            ray.init(
                address="local",
                num_cpus=2,
                num_gpus=num_replicas,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            started, cpu_started = time.perf_counter(), time.process_time()
        num_new = len(run.pending)
        summary = run_inference(run)
    return {
        "num_new": num_new,
        "elapsed_s": time.perf_counter() - started,
        "score": summary.score,
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB,
        "driver_cpu_s_per_1000": 1000 * (time.process_time() - cpu_started) / summary.num_rows,
        "worker_peak_mib": max(peaks.values(), default=0) / _MIB,
    }


@contextmanager
def watched_workers() -> Iterator[dict[int, int]]:
    """Note the most memory that each process of Ray's workers has meanwhile, shared memory left out."""
    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(2):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.name().startswith("ray::"):
                        memory = process.memory_info()
                        peaks[process.pid] = max(peaks.get(process.pid, 0), memory.rss - memory.shared)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def steady_rate(output_dir: Path) -> float:
    """Return rows per second from a fifth of the rows to the last, by when their parts were written."""
    parts = sorted((output_dir / "predictions").glob("part-*.parquet"), key=lambda part: part.stat().st_mtime)
    times = [part.stat().st_mtime for part in parts]
    sizes = [pq.read_metadata(part).num_rows for part in parts]
    first = max(1, len(parts) // 5)
    return sum(sizes[first:]) / (times[-1] - times[first - 1])


if __name__ == "__main__":
    main()
