"""One step in a process of its own: it loads what it needs, waits for its turn, and tells what it finds.

    python -m benchmarks.gpu.child STEP SETTING

`python -m benchmarks.gpu` starts these. SETTING is the setting as JSON. A line on the standard input is the
turn; each line of the standard output is a figure as a JSON list, name and value.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import STEPS


def main() -> None:
    """Take the step."""
    name, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    (step,) = (step for step in STEPS if step.name == name)
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries and other processes print goes to the log
    module, _, function = step.function.partition(":")
    measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    sys.stdin.readline()
    for figure in measure(setting, **step.options):
        print(json.dumps(figure), file=output)


if __name__ == "__main__":
    main()
