"""What can be asked for: the options of each job. Standard library only."""

from vlmray.config.common import (
    NAME,
    BenchmarkConfig,
    Candidate,
    DemoConfig,
    FinetuneConfig,
    InferConfig,
    ModelConfig,
    QuestionsConfig,
    ServeConfig,
)

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
