"""Serve a vision-language model and adapters behind an OpenAI-compatible endpoint on Ray Serve.

On one machine, the built-in model, which needs no network:

    python jobs/serve.py --model_id builtin

On a cluster, Qwen2.5-VL-7B and an adapter on one to eight GPUs:

    ray job submit --working-dir . -- python jobs/serve.py --num_replicas 1,8 --adapters chart=s3://bucket/adapter
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs where vlmray is not installed

from vlmray.cli import run_job

if __name__ == "__main__":
    run_job("serve")
