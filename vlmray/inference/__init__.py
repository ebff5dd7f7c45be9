"""The job that answers a dataset, over Ray Data.

plan -> pipeline of stages -> results, report
"""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "InferenceError": "plan",
        "Task": "stages",
        "plan_inference": "plan",
        "process_single_sample": "stages",
        "run_inference": "job",
    },
)
