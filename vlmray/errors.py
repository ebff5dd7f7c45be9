"""Errors that users see: a mistake in an option, a run that could not go on; each one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class OptionError(ValueError):
    """A mistake in an option: what is wrong with it, and what would be right.

    Attributes:
        option: The option's name, without hyphens.
        problem: What was found and what was expected. It goes on after the option's name, so it begins with
            a verb, with the value that was given, or with a colon.
        hint: The next step, where the problem does not say it.
    """

    def __init__(self, option: str, problem: str, hint: str = "") -> None:
        super().__init__(option, problem, hint)  # as given, so that it survives pickling
        self.option = option
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        """Say it in one line."""
        space = "" if self.problem.startswith(":") else " "
        return f"--{self.option}{space}{self.problem}" + (f"; {self.hint}" if self.hint else "")


@contextlib.contextmanager
def mistake_in(option: str) -> Iterator[None]:
    """Make a `ValueError` of what an option was given to a mistake in that option."""
    try:
        yield
    except ValueError as error:
        raise OptionError(option, f": {error}") from error


class ContextLengthError(ValueError):
    """A prompt that leaves the model no position for an answer."""

    code = "context_length_exceeded"

    def __init__(self, num_tokens: int, max_model_len: int) -> None:
        super().__init__(num_tokens, max_model_len)  # as given, so that it survives pickling
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len

    def __str__(self) -> str:
        """Say it in one line, with the words by which clients know it."""
        return (
            f"this model's maximum context length is {self.max_model_len} tokens, and the prompt has "
            f"{self.num_tokens}; shorten it or lower --max_pixels"
        )


class RunError(RuntimeError):
    """A job that failed after it had started; what it finished is kept."""


def one_line(error: object, limit: int = 300) -> str:
    """Put what an error says on one line.

    Args:
        error: An exception, or a text about one.
        limit: Most characters.

    Returns:
        The line; the name of the error's type where it says nothing.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__
