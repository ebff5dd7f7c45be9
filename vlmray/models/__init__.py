"""A checkpoint: found, checked, loaded, adapted, merged."""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "get_default_lora_config_for_qwen_vl": "lora",
        "load_processor": "processors",
        "load_qwen_vl_model_and_processor": "loading",
        "merge_adapter": "merging",
    },
)
