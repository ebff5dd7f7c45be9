"""How fast is the engine at the real shapes, beside plain `generate` and beside what the card could do?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.limit import count_work, measure_products
from benchmarks.common.models import make_random_model
from benchmarks.engine.ways import Question, answer_plainly, vllm_way
from benchmarks.gpu.setting import Figures, Setting
from vlmray.engines.transformers.attention import pack_attention
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.models.families import family_of
from vlmray.schema import GenerationRequest

BATCH_SIZE = 64
REPEATS = 2
_WARM_UP = 8
_PROFILED = 32


def measure(setting: Setting, *, size: str) -> Figures:
    """Answer rows in their natural order: by plain `generate`, then by the engine.

    Args:
        setting: Says how many rows.
        size: `small` or `large`, of the scale.
    """
    scale, device = setting.scale, setting.device
    started = time.perf_counter()
    model = make_random_model(getattr(scale, size), setting.processor, device=device, dtype=setting.dtype)
    model.generation_config.eos_token_id = None  # answers have the lengths that they are given
    processor = setting.load_processor()
    requests = setting.read_requests(scale.num_rows)
    yield "made_ready_s", time.perf_counter() - started
    yield "weights_gib", sum(p.numel() * p.itemsize for p in model.parameters()) / 2**30
    plain = {}
    for name, batch_size, num_rows in (
        ("alone", 1, scale.num_alone),
        ("padded", 8, scale.num_padded),
    ):
        plain[name] = yield from _measure_plainly(
            setting, model, processor, requests, name, batch_size, num_rows
        )
    rate = yield from _measure_engine(setting, model, processor, requests)
    for name, other in plain.items():
        yield f"times_generate_{name}", rate / other


def _measure_plainly(
    setting: Setting, model: Any, processor: Any, requests: Sequence[GenerationRequest], name: str,
    batch_size: int, num_rows: int,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Yield rate and peak of plain `generate`; return the rate."""
    questions = [_to_question(request, processor) for request in requests[:num_rows]]
    answer_plainly(model, processor, questions[:_WARM_UP], batch_size)
    _forget_peak(setting)
    rate = num_rows / _time(lambda: answer_plainly(model, processor, questions, batch_size))
    yield f"generate_{name}_rows_per_s", rate
    yield from _peak(setting, f"generate_{name}")
    return rate


def _measure_engine(
    setting: Setting, model: Any, processor: Any, requests: Sequence[GenerationRequest]
) -> Iterator[tuple[str, Any]]:
    """Yield what the engine does, what it could, and where its time goes; return its rate."""
    family_of(model.config).prepare(model)  # as loading does
    pack_attention(model)
    engine = TransformersEngine(model, processor, batch_size=BATCH_SIZE)
    yield "max_batch_tokens", engine.batcher.max_batch_tokens
    engine.generate(requests[:BATCH_SIZE])
    _forget_peak(setting)
    waited_s, rates, completions = engine.waited_s, [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        completions = engine.generate(requests)
        rates.append(len(requests) / (time.perf_counter() - started))
    rate = statistics.median(rates)
    yield "engine_rows_per_s", rate
    yield "engine_rows_per_s_runs", rates
    yield from _peak(setting, "engine")
    errors = [completion.error for completion in completions if completion.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(requests)} rows failed, the first: {errors[0]}")
    elapsed_s = REPEATS * len(requests) / rate
    yield "waiting_for_cpu_share", (engine.waited_s - waited_s) / elapsed_s
    work = count_work(engine, requests, completions)
    products = measure_products(setting.device, setting.dtype)
    yield "work_tflop_per_row", work / len(requests) / 1e12
    yield "limit_rows_per_s", products / work * len(requests)
    yield "share_of_limit", rate * work / len(requests) / products
    with _watch(model) as parts:
        engine.generate(requests)
    for name, seconds in parts().items():
        yield f"{name}_share", seconds / (len(requests) / rate)
    yield "widest_operations_ms", _profile(engine, requests[:_PROFILED])
    engine.close()
    return rate


def measure_vllm(setting: Setting) -> Figures:
    """Answer the same rows with vLLM, all at once."""
    processor = setting.load_processor()
    questions = [_to_question(each, processor) for each in setting.read_requests(setting.scale.num_rows)]
    work = {
        "model_id": setting.model_folder(setting.scale.large), "dtype": setting.dtype,
        "device": setting.device, "forced": True,
    }  # fmt: skip
    answer = vllm_way(work, questions)
    answer()
    yield "vllm_rows_per_s", len(questions) / _time(answer)


def _to_question(request: GenerationRequest, processor: Any) -> Question:
    return Question(
        prompt=processor.apply_chat_template(request.messages, add_generation_prompt=True),
        messages=list(request.messages),
        images=[image for image in request.images if isinstance(image, bytes)],
        max_new_tokens=request.max_new_tokens,
    )


def _time(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _forget_peak(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(setting: Setting, name: str) -> Figures:
    if setting.device == "cuda":
        yield f"{name}_peak_gib", torch.cuda.max_memory_allocated() / 2**30


@contextmanager
def _watch(model: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Time a model's parts while it works; yield what tells their seconds afterwards.

    On a GPU by events in its stream, so that nothing waits for anything because of it.
    """
    marks: list[tuple[str, Any, Any]] = []

    def watch(module: Any, name_of: Callable[[dict[str, Any]], str]) -> list[Any]:
        def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            marks.append((name_of(kwargs), _now(), None))

        def leave(module: Any, args: Any, output: Any) -> None:
            name, began, _ = marks[-1]
            marks[-1] = (name, began, _now())

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]

    handles = [
        *watch(model.model.visual, lambda kwargs: "tower"),
        *watch(
            model.model.language_model,
            lambda kwargs: "decode" if kwargs["inputs_embeds"].shape[1] == 1 else "prefill",
        ),
    ]

    def parts() -> dict[str, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, began, ended in marks:
            seconds[name] = seconds.get(name, 0.0) + _between(began, ended)
        return seconds

    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else float(began.elapsed_time(ended)) / 1000


def _profile(engine: TransformersEngine, requests: Sequence[GenerationRequest]) -> list[list[Any]]:
    """Return the ten widest operations with their milliseconds: kernels on a GPU, operators on a CPU."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        engine.generate(requests)
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        for event in profiled.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    }
    widest = sorted(times, key=lambda key: -times[key])[:10]
    total = [["all", round(sum(times.values()), 1)]]
    return total + [[key[:90], round(times[key], 1)] for key in widest]
