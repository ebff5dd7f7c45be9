r"""Answer a visual-question dataset with a vision-language model on Ray.

On one machine, with the built-in model and charts, no network needed:

    python jobs/infer.py --model_id builtin --dataset_name "charts?kind=bar&style=plain" \
        --sample_slices "[0:200]"

On a cluster, ChartQA with Qwen2.5-VL-7B on all its GPUs:

    ray job submit --working-dir . -- python jobs/infer.py --sample_slices "[:]" --output_dir s3://bucket/chartqa
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs where vlmray is not installed

from vlmray.cli import run_job

if __name__ == "__main__":
    run_job("infer")
