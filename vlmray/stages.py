"""The former place of `vlmray.inference.stages`, which the README used to print."""

from vlmray.inference.stages import Task, process_single_sample

__all__ = ["Task", "process_single_sample"]
