"""The console command: `vlmray infer ...` is `python jobs/infer.py ...` from an installed wheel.

Each job is a config and a function that takes it and returns an exit code: 0 done, 1 failed after it
started (what was finished is kept), 2 a mistake in the options, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from vlmray import __version__
from vlmray.config import BenchmarkConfig, DemoConfig, FinetuneConfig, InferConfig, ServeConfig
from vlmray.config.parsing import parse_args
from vlmray.errors import RunError, one_line
from vlmray.terminal import steady_streams, use_utf8


class JobConfig(Protocol):
    """What every job's options have."""

    @property
    def log_level(self) -> str:
        """How much is said."""
        ...


C = TypeVar("C", bound=JobConfig)


@dataclass(frozen=True, slots=True)
class Job(Generic[C]):
    """A job: the options it takes and what it does with them."""

    config_class: type[C]
    main: Callable[[C], int]
    kept: str
    """What to do after it was interrupted."""


def infer(config: InferConfig) -> int:
    """Answer a dataset and print the closing table; return the exit code."""
    # Imported here: `--help` and mistyped options must not wait for Ray.
    from vlmray.inference.job import describe, run_inference
    from vlmray.inference.plan import plan_inference
    from vlmray.inference.report import format_table

    run = plan_inference(config)
    if config.dry_run:
        return _print_plan(describe(run))
    summary = run_inference(run)
    print(f"\n{format_table(summary)}\n\nreport: {run.folder.uri}/report.html")
    return 0 if summary.num_answered else 1


def finetune(config: FinetuneConfig) -> int:
    """Train, print the closing table; return the exit code: 1 where a check of the result failed."""
    from vlmray.finetune.job import describe, run_finetune
    from vlmray.finetune.plan import plan_finetune
    from vlmray.finetune.report import format_training_table

    run = plan_finetune(config)
    if config.dry_run:
        return _print_plan(describe(run))
    report = run_finetune(run)
    print(f"\n{format_training_table(report)}\n\nreport: {run.folder.uri}/report.html")
    return 0 if all(check.passed for check in report.checks) else 1


def _print_plan(lines: Sequence[tuple[str, str]]) -> int:
    """Print what a job would do; return the exit code."""
    width = max(len(title) for title, _ in lines)
    for title, text in lines:
        print(f"{title:{width}}  {text}")
    print("a dry run: nothing was started or written")
    return 0


def serve(config: ServeConfig) -> int:
    """Serve until interrupted, then answer what is in progress; return the exit code."""
    from vlmray.serving.server import API_KEY, serve_app

    server = serve_app(config)
    print(f"{config.base_name} is served at {server.url}/v1, a page to try it on at {server.url}/")
    if server.choice.is_news:
        print(server.choice)
    if not os.environ.get(API_KEY):
        print(f"without an API key, so on this machine only; {API_KEY} sets one")
    print("Ctrl-C stops it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    print("stopping: requests in progress are answered, new ones are not", flush=True)
    num_left = server.stop()
    if num_left:
        raise RunError(f"{num_left} requests were cut off after {config.drain_timeout_s:g} s")
    return 0


def benchmark(config: BenchmarkConfig) -> int:
    """Compare models and print what came of it; return the exit code: 1 where nothing was answered."""
    from vlmray.benchmark.gathering import pilot
    from vlmray.benchmark.job import run_benchmark
    from vlmray.benchmark.plan import plan_benchmark
    from vlmray.benchmark.report import format_plan, format_results

    if config.datasets:
        return _suite(config)
    planned = plan_benchmark(config)
    if config.plan:
        print(f"\n{format_plan(pilot(planned), config)}")
        return 0
    results = run_benchmark(planned)
    print(f"\n{format_results(results)}\n\nreport: {config.output_dir}/report.html")
    return 0 if results.num_answered else 1


def _suite(config: BenchmarkConfig) -> int:
    from vlmray.benchmark.gathering import pilot
    from vlmray.benchmark.report import format_plan
    from vlmray.benchmark.suite.job import plan_suite, run_suite
    from vlmray.benchmark.suite.report import format_suite

    planned = plan_suite(config)
    if config.plan:
        for name, each in planned.items():
            print(f"\n{name}: {format_plan(pilot(each), each.config)}")
        return 0
    results = run_suite(config, planned)
    print(f"\n{format_suite(results)}\n\nreport: {config.output_dir}/report.html")
    return 0 if results.num_answered else 1


def demo(config: DemoConfig) -> int:
    """Teach the built-in model something and print what it learned; return the exit code."""
    from vlmray.demo.job import run_demo
    from vlmray.demo.report import format_demo

    report = run_demo(config)
    print(f"\n{format_demo(report)}\n\nreport: {config.output_dir}/report.html")
    return 0


JOBS: dict[str, Job[Any]] = {
    "infer": Job(InferConfig, infer, "everything finished is kept, the same command resumes"),
    "finetune": Job(FinetuneConfig, finetune, "with --resume it goes on from its last checkpoint"),
    "serve": Job(ServeConfig, serve, "start it again"),
    "benchmark": Job(
        BenchmarkConfig, benchmark, "everything answered and measured is kept, the same command goes on"
    ),
    "demo": Job(DemoConfig, demo, "the same command goes on"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the job that the first argument names, and exit with its code."""
    if argv is None:
        use_utf8()
    steady_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    if name in JOBS:
        run_job(name, argv[1:], prog=f"vlmray {name}")
    if name == "--version":
        print(f"vlmray {__version__}")
    elif name in ("-h", "--help"):
        print(f"usage: vlmray {{{','.join(JOBS)}}} [options]")
        print("vlmray JOB --help lists the options of a job.")
    else:
        sys.exit(_fail(2, f"unknown job {name!r}; known: {', '.join(JOBS)}"))
    sys.exit(0)


def run_job(name: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> NoReturn:
    """Parse a job's options, run it, and exit: mistakes and failures are one line on stderr."""
    if argv is None:
        use_utf8()
    steady_streams()
    job = JOBS[name]
    config = parse_args(job.config_class, argv, prog=prog)
    logging.basicConfig(level=config.log_level, format="%(levelname)s %(name)s: %(message)s")
    # It warns of an optional package on some CPUs, for 4-bit weights that nobody may have asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Ray prints a paragraph for each worker that is lost, and its traceback for each retry of a model that
    # does not load; what the job itself says of it will do.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "retries remaining|A worker died or was killed")
    # `ray job stop` and schedulers send SIGTERM; it ends a run the way Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = job.main(config)
    except KeyboardInterrupt:
        code = _fail(130, f"interrupted; {job.kept}")
    except Exception as error:  # the last one who could say what became of the job
        code = _explain(error, job.kept)
    signal.signal(
        signal.SIGINT, lambda *_: os._exit(130)
    )  # Ray takes a while to leave; a second one need not
    sys.exit(code)


def _explain(error: Exception, kept: str) -> int:
    """Say in one line what ended a job; of a fault of the program itself, in as many as it takes."""
    if isinstance(error, ValueError | FileNotFoundError):
        return _fail(2, str(error), error)
    if isinstance(error, RunError):
        return _fail(1, f"{error}; {kept}", error)
    if isinstance(error, OSError):
        return _fail(1, f"{one_line(error)}; {kept}", error)
    if type(error).__module__.startswith("ray."):
        from vlmray.cluster import root_cause

        return _fail(1, f"{root_cause(error)}; {kept}", error)
    traceback.print_exception(error)
    return _fail(1, f"this is a fault of vlmray: please report it with the lines above; {kept}")


def _fail(code: int, message: str, error: BaseException | None = None) -> int:
    logging.getLogger(__name__).debug("the job failed", exc_info=error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
