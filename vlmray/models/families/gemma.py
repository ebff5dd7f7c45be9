"""Gemma 3 and 4, and PaliGemma."""

from __future__ import annotations

from vlmray.models.families.base import Family, Layout

# Its processor puts the start of the sequence behind the images, and a line break behind the question.
_PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)

# Its vision layers are wrapped, and the wrapped one is the linear layer.
_GEMMA4 = {
    "vision": r"model\.vision_tower\.encoder\.layers\.\d+"
    r"\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.linear",
    "merger": r"model\.embed_vision\.embedding_projection",
}

FAMILIES = (
    Family(model_types=("gemma3",)),
    Family(model_types=("gemma4",), needs=("torchvision",), lora=_GEMMA4),
    Family(
        model_types=("paligemma",),
        chat_template=_PALIGEMMA_TEMPLATE,
        layout=Layout(fills={"token_type_ids": 1}),  # 0 is the prompt, which is read both ways
    ),
)
