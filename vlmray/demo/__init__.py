"""The whole story by one command: ask, train, ask again, compare."""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "run_demo": "job",
    },
)
