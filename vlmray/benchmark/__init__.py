"""The job that compares models, honestly.

plan -> ask -> score -> conclude -> report
"""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "BenchmarkError": "job",
        "plan_benchmark": "job",
        "run_benchmark": "job",
    },
)
