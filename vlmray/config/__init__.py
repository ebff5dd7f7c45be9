"""What can be asked for: the options of each job. Standard library only, and yaml for `--config`."""

from vlmray.config.benchmark import BenchmarkConfig, Candidate
from vlmray.config.common import (
    NAME,
    DatasetConfig,
    EngineConfig,
    LoadingConfig,
    ModelConfig,
    QuestionsConfig,
    ReplicaConfig,
    RunConfig,
    shared_options,
)
from vlmray.config.demo import DemoConfig
from vlmray.config.endpoint import EndpointConfig
from vlmray.config.finetune import FinetuneConfig
from vlmray.config.infer import InferConfig
from vlmray.config.marks import known_options, options_that_affect
from vlmray.config.sampling import SamplingConfig, sampling_of
from vlmray.config.serve import ServeConfig

__all__ = [
    "NAME",
    "BenchmarkConfig",
    "Candidate",
    "DatasetConfig",
    "DemoConfig",
    "EndpointConfig",
    "EngineConfig",
    "FinetuneConfig",
    "InferConfig",
    "LoadingConfig",
    "ModelConfig",
    "QuestionsConfig",
    "ReplicaConfig",
    "RunConfig",
    "SamplingConfig",
    "ServeConfig",
    "known_options",
    "options_that_affect",
    "sampling_of",
    "shared_options",
]
