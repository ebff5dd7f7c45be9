"""The whole story by one command: train, ask without and with it, compare."""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "run_demo": "job",
    },
)
