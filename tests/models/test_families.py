"""What is known of a family of models is found by the type that its config names."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlmray.models.families import FAMILIES, family_of
from vlmray.models.families.base import Family


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_known_type_is_one_that_transformers_has(model_type: str) -> None:
    assert CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    assert family_of(model_type) is FAMILIES[model_type]


def test_of_another_type_is_known_what_holds_for_all() -> None:
    family = family_of("llava")
    assert type(family) is Family
    assert not any([family.shares_prefix, family.takes_image_features, family.packs_attention])
    with pytest.raises(NotImplementedError, match="the vision tower of object"):
        family.vision_tower(object())
