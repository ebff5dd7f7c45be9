"""Vision-language models over Ray: batch inference, fine-tuning, serving and honest comparison.

    from vlmray import Sample, Task, build_engine, process_single_sample

Importing the package costs nothing: every name is imported when it is asked for, so `vlmray --help` does not
wait for torch or Ray.
"""

from typing import TYPE_CHECKING

from vlmray._lazy import offer

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from vlmray.benchmark.job import run_benchmark as run_benchmark
    from vlmray.benchmark.plan import plan_benchmark as plan_benchmark
    from vlmray.builtin.charts import ChartDataset as ChartDataset
    from vlmray.builtin.charts import parse_charts_name as parse_charts_name
    from vlmray.config.benchmark import BenchmarkConfig as BenchmarkConfig
    from vlmray.config.finetune import FinetuneConfig as FinetuneConfig
    from vlmray.config.infer import InferConfig as InferConfig
    from vlmray.config.serve import ServeConfig as ServeConfig
    from vlmray.dataset.columns import get_dataset_columns as get_dataset_columns
    from vlmray.dataset.huggingface import load_hf_dataset as load_hf_dataset
    from vlmray.dataset.prompts import format_data as format_data
    from vlmray.dataset.prompts import format_qwen_vl_messages as format_qwen_vl_messages
    from vlmray.dataset.registry import DatasetSpec as DatasetSpec
    from vlmray.dataset.registry import register_dataset as register_dataset
    from vlmray.dataset.slices import parse_sample_slices as parse_sample_slices
    from vlmray.engines import build_engine as build_engine
    from vlmray.engines.base import Engine as Engine
    from vlmray.engines.fake import FakeEngine as FakeEngine
    from vlmray.finetune.job import run_finetune as run_finetune
    from vlmray.finetune.plan import plan_finetune as plan_finetune
    from vlmray.images.reading import load_image_pil as load_image_pil
    from vlmray.inference.job import run_inference as run_inference
    from vlmray.inference.plan import plan_inference as plan_inference
    from vlmray.inference.stages import Task as Task
    from vlmray.inference.stages import process_single_sample as process_single_sample
    from vlmray.metrics.definitions import score as score
    from vlmray.models.loading import generate_text_from_sample as generate_text_from_sample
    from vlmray.models.loading import load_qwen_vl_model_and_processor as load_qwen_vl_model_and_processor
    from vlmray.models.lora import get_default_lora_config_for_qwen_vl as get_default_lora_config_for_qwen_vl
    from vlmray.models.merging import merge_adapter as merge_adapter
    from vlmray.schema import Completion as Completion
    from vlmray.schema import GenerationRequest as GenerationRequest
    from vlmray.schema import Sample as Sample
    from vlmray.serving.server import serve_app as serve_app
    from vlmray.training.collator import DataCollatorForVLMSFT as DataCollatorForVLMSFT
    from vlmray.training.worker import train_loop_per_worker as train_loop_per_worker

_HOMES = {
    # rows and options
    "Sample": "schema",
    "GenerationRequest": "schema",
    "Completion": "schema",
    "InferConfig": "config.infer",
    "FinetuneConfig": "config.finetune",
    "ServeConfig": "config.serve",
    "BenchmarkConfig": "config.benchmark",
    # data
    "load_hf_dataset": "dataset.huggingface",
    "DatasetSpec": "dataset.registry",
    "get_dataset_columns": "dataset.columns",
    "register_dataset": "dataset.registry",
    "parse_sample_slices": "dataset.slices",
    "format_data": "dataset.prompts",
    "format_qwen_vl_messages": "dataset.prompts",
    "load_image_pil": "images.reading",
    "ChartDataset": "builtin.charts",
    "parse_charts_name": "builtin.charts",
    # models, engines, training
    "load_qwen_vl_model_and_processor": "models.loading",
    "generate_text_from_sample": "models.loading",
    "get_default_lora_config_for_qwen_vl": "models.lora",
    "merge_adapter": "models.merging",
    "Engine": "engines.base",
    "FakeEngine": "engines.fake",
    "build_engine": "engines",
    "DataCollatorForVLMSFT": "training.collator",
    "train_loop_per_worker": "training.worker",
    # one sample, one job
    "Task": "inference.stages",
    "process_single_sample": "inference.stages",
    "score": "metrics.definitions",
    "plan_inference": "inference.plan",
    "run_inference": "inference.job",
    "plan_finetune": "finetune.plan",
    "run_finetune": "finetune.job",
    "serve_app": "serving.server",
    "plan_benchmark": "benchmark.plan",
    "run_benchmark": "benchmark.job",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = offer(__name__, _HOMES)
