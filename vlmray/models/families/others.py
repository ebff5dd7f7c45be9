"""Families of which little has to be said."""

from __future__ import annotations

from vlmray.models.families.base import Family, Layout

_PATCHES = Layout(ragged={"pixel_values": (1,), "pixel_attention_mask": (1,)})

_LFM2 = {
    "language": r"model\.language_model\.layers\.\d+"
    r"\.(?:self_attn\.(?:[qkv]_proj|out_proj)|conv\.(?:in|out)_proj|feed_forward\.w[123])"
}

FAMILIES = (
    Family(model_types=("internvl",), shares_prefix=True),
    Family(model_types=("aya_vision",)),
    Family(model_types=("lfm2_vl",), needs=("torchvision",), layout=_PATCHES, lora=_LFM2),
)
