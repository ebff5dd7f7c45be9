"""What went wrong in a worker, in one line."""

from __future__ import annotations

import re

import ray

from vlmray.errors import OptionError, RunError, one_line

_FRAME = re.compile(r"^( +)File ", re.MULTILINE)
_OURS = re.compile(r"^vlmray\.[\w.]+Error: ")  # as a traceback says whose error it is
_ADVICE = re.compile(
    r"\s+(?=Failed to .+ after \d+/\d+ attempts|To change retry attempts|For further information visit|"
    r"This looks like an AWS S3 permissions error|Some common causes include)"
)
"""What libraries put behind the cause."""

_WRAPPED = "The above exception was the direct cause of the following exception:"
_MOST_CHARS = 600


def root_cause(error: BaseException) -> str:
    """Name what went wrong in a worker, in one line, without the layers that carried it here."""
    failures = getattr(error, "worker_failures", None)  # of Ray Train, by rank
    if failures:
        error = failures[min(failures)]
    told = str(error)
    while (cause := getattr(error, "cause", None)) is not None:
        # Ray Data wraps what was raised, and what came before does not survive the way here but as text.
        told = (
            told.rpartition(_WRAPPED)[0]
            if isinstance(cause, ray.exceptions.UserCodeException)
            else str(cause)
        )
        error = cause
    raised = _raised_last(told)
    text = one_line(_ADVICE.split(raised or told)[0] or type(error).__name__, _MOST_CHARS)
    if "No space left on device" in text:
        return f"no space left on device: free some and run again ({text})"
    if isinstance(error, OptionError | RunError) or raised:
        return _OURS.sub("", text)
    return f"{type(error).__name__}: {text}"


def _raised_last(text: str) -> str:
    """Return what was raised last in a traceback, which the error of an actor that did not start has in it.

    Behind a frame's lines of code it is what is indented no deeper than the word `File`.
    """
    frames = list(_FRAME.finditer(text))
    if not frames:
        return ""
    indentation = len(frames[-1][1])
    lines = text[frames[-1].end() :].splitlines()[1:]
    begins = (
        n for n, line in enumerate(lines) if line.strip() and len(line) - len(line.lstrip()) < indentation
    )
    return "\n".join(lines[next(begins, len(lines)) :])
