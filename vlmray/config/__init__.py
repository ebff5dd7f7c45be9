"""What can be asked for: the options of each job. Standard library only."""

from vlmray.config.benchmark import BenchmarkConfig, Candidate
from vlmray.config.common import NAME, ModelConfig, QuestionsConfig
from vlmray.config.demo import DemoConfig
from vlmray.config.finetune import FinetuneConfig
from vlmray.config.infer import InferConfig
from vlmray.config.serve import ServeConfig

__all__ = [
    "NAME",
    "BenchmarkConfig",
    "Candidate",
    "DemoConfig",
    "FinetuneConfig",
    "InferConfig",
    "ModelConfig",
    "QuestionsConfig",
    "ServeConfig",
]
