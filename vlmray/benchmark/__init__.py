"""The job that compares models, honestly.

plan -> ask -> score -> conclude -> report
"""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "BenchmarkError": "plan",
        "plan_benchmark": "plan",
        "run_benchmark": "job",
    },
)
