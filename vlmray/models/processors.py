"""Load the processor that feeds a model."""

from __future__ import annotations

from typing import Any

from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, AutoProcessor, PreTrainedConfig

from vlmray.errors import OptionError, one_line
from vlmray.models.families import family_of


def load_processor(
    model_id: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model's processor with left padding and images by way of PIL.

    torchvision is not needed, and where it is installed images still take the PIL path, so that the
    same image gives the same pixels on every machine. Without torchvision the processor has no video
    part.

    Args:
        model_id: Local checkpoint folder or hub id.
        min_pixels: Smallest image area in pixels after resizing; None keeps the checkpoint's.
        max_pixels: Largest image area in pixels after resizing; None keeps the checkpoint's.
        trust_remote_code: Run processor code that comes with the checkpoint.

    Raises:
        ValueError: Pixel limits that contradict each other, or that this image processor does not have.
    """
    try:
        processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError) as error:  # which of them, depends on the class
        processor = _load_processor_without_video(model_id, error, trust_remote_code=trust_remote_code)
    if getattr(processor.image_processor, "backend", "pil") != "pil":
        processor.image_processor = AutoImageProcessor.from_pretrained(
            model_id, backend="pil", trust_remote_code=trust_remote_code
        )
    if getattr(processor, "chat_template", None) is None:
        config, _ = PreTrainedConfig.get_config_dict(model_id)
        processor.chat_template = family_of(config).chat_template
    processor.tokenizer.padding_side = "left"
    _set_pixel_limits(processor.image_processor, min_pixels, max_pixels)
    return processor


def _load_processor_without_video(model_id: str, cause: Exception, *, trust_remote_code: bool) -> Any:
    """Load a processor whose video part cannot be imported, without that part.

    transformers has video processors for torchvision only, and AutoProcessor gives up where it is not
    installed even if no video is ever shown. A processor class that does not list the video part as an
    attribute is loaded without it, and its `__init__` takes None for it.
    """
    config = AutoConfig.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    base: Any = PROCESSOR_MAPPING.get(type(config), None)
    if base is None or "video_processor" not in base.get_attributes():
        if not isinstance(cause, ImportError):
            raise cause
        raise OptionError(
            "model_id",
            f"{model_id}: its processor does not load ({one_line(cause, 300)})",
            "install the package that is named, or pip install 'vlmray[vision]'",
        ) from cause
    attributes = [name for name in base.get_attributes() if name != "video_processor"]
    # The name is kept because save_pretrained writes it, for AutoProcessor to find elsewhere.
    members = {"get_attributes": classmethod(lambda cls: list(attributes))}
    without_video: Any = type(base.__name__, (base,), members)
    return without_video.from_pretrained(model_id, trust_remote_code=trust_remote_code)


def _set_pixel_limits(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    if min_pixels is None and max_pixels is None:
        return
    size = image_processor.size
    smallest = min_pixels if min_pixels is not None else getattr(size, "shortest_edge", None)
    largest = max_pixels if max_pixels is not None else getattr(size, "longest_edge", None)
    if smallest is None or largest is None or not hasattr(image_processor, "merge_size"):
        raise OptionError(
            "min_pixels",
            f"and --max_pixels do not apply to {type(image_processor).__name__}, which resizes to {size}",
            "leave them out",
        )
    if not 0 < smallest <= largest:
        raise OptionError("min_pixels", f"{smallest} must be above 0 and not above --max_pixels {largest}")
    image_processor.size = type(size)(shortest_edge=smallest, longest_edge=largest)
