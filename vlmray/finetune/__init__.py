"""The job that fine-tunes, over Ray Train.

plan -> workers -> artifacts, checked -> report
"""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "FinetuneError": "plan",
        "plan_finetune": "plan",
        "run_finetune": "job",
    },
)
