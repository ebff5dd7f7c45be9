"""One training worker, with Ray and without; torch and TRL."""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "DataCollatorForVLMSFT": "collator",
        "train_loop_per_worker": "worker",
    },
)
