"""Rows: where they come from, what their columns mean, how they are worded."""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "DATASETS": "registry",
        "DatasetSpec": "registry",
        "format_data": "prompts",
        "format_qwen_vl_messages": "prompts",
        "get_dataset_columns": "registry",
        "load_hf_dataset": "huggingface",
        "open_source": "sources",
        "parse_sample_slices": "slices",
        "register_dataset": "registry",
    },
)
