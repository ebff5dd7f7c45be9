r"""Compare models and adapters on a visual-question dataset: how right they are, and how fast.

On one machine, the built-in model and an adapter that `vlmray demo` trained:

    python jobs/benchmark.py --models base=builtin,tuned=builtin+outputs/demo/lora/adapter \
        --dataset_name "charts?kind=bar&style=plain&num_rows=400" --max_new_tokens 48

On a cluster, Qwen2.5-VL-7B and an adapter on ChartQA:

    ray job submit --working-dir . -- python jobs/benchmark.py \
        --models base=Qwen/Qwen2.5-VL-7B-Instruct,tuned=Qwen/Qwen2.5-VL-7B-Instruct+/mnt/adapter \
        --dataset_name HuggingFaceM4/ChartQA --output_dir /mnt/outputs/benchmark
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs where vlmray is not installed

from vlmray.cli import run_job

if __name__ == "__main__":
    run_job("benchmark")
