"""What chat templates are called with already, and variables therefore cannot be named."""

from __future__ import annotations

_TAKEN = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents",
    "load_audio_from_video", "messages", "processor_kwargs", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "self", "tokenize", "tools",
}  # fmt: skip


def is_taken(name: str) -> bool:
    """Tell whether a name is taken: by an argument, or a special token."""
    return name in _TAKEN or name.endswith("_token")
