"""The job that serves, over Ray Serve.

HTTP gateway -> handle -> model replicas
"""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "app": "server",
        "serve_app": "server",
    },
)
