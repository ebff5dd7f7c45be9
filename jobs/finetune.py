"""Fine-tune a vision-language model with LoRA on Ray Train.

On one machine, with the built-in model and charts, no GPU and no network needed:

    python jobs/finetune.py --model_id builtin --dataset_name "charts?kind=bar&style=plain" --max_steps 50

On a cluster, ChartQA with Qwen2.5-VL-7B on eight GPUs:

    ray job submit --working-dir . -- python jobs/finetune.py --num_workers 8 --output_dir s3://bucket/lora
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs where vlmray is not installed

from vlmray.cli import run_job

if __name__ == "__main__":
    run_job("finetune")
