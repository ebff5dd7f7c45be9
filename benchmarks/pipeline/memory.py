"""Does the driver's memory grow with the dataset? Peak memory of a short and of a long run.

    python -m benchmarks.pipeline.memory --num_rows 2000 20000

Synthetic charts with real images go through the whole pipeline with the FakeEngine; every run is a
process of its own, which reports its own peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

from vlmray.config import InferConfig
from vlmray.inference.job import run_inference
from vlmray.inference.plan import plan_inference

MIB_PER_KIB = 1 / 1024  # ru_maxrss counts KiB on Linux


def main() -> None:
    """Run each size in a process of its own and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num_rows", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--output_format", default="both", choices=["files", "parquet", "both"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.num_rows[0], options.output_format)))
        return
    results = [run_child(num_rows, options.output_format) for num_rows in options.num_rows]
    print(f"{'rows':>8} {'driver peak MiB':>16} {'elapsed s':>10} {'samples/s':>10}")
    for result in results:
        print("{num_rows:8} {driver_peak_mib:16.0f} {elapsed_s:10.1f} {samples_per_s:10.1f}".format(**result))
    ratio = results[-1]["driver_peak_mib"] / results[0]["driver_peak_mib"]
    print(f"driver peak, longest over shortest: {ratio:.2f}")
    print(json.dumps({"runs": results, "ratio": ratio}))


def run_child(num_rows: int, output_format: str) -> dict[str, float]:
    options = f"--child --num_rows {num_rows} --output_format {output_format}".split()
    child = [sys.executable, "-m", "benchmarks.pipeline.memory", *options]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(num_rows: int, output_format: str) -> dict[str, float]:
    """Answer the charts in this process and return its figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = InferConfig(
            engine="fake", model_id="fake", dataset_name=f"charts?num_rows={num_rows}", sample_slices="[:]",
            output_dir=folder, output_format=output_format,
        )  # fmt: skip
        summary = run_inference(plan_inference(config))
        assert summary.num_answered == num_rows
    elapsed_s = time.perf_counter() - started
    return {
        "num_rows": num_rows,
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MIB_PER_KIB,
        "elapsed_s": elapsed_s,
        "samples_per_s": num_rows / elapsed_s,
    }


if __name__ == "__main__":
    main()
