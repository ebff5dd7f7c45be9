"""What the package asks of a family of models, and what holds for all of them.

Nothing here imports torch, so that a job can look a family up in its first second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fill = int | Literal["last"]
"""What tokens get that a processor never saw: a number, or what the last token before them has."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the tensors of rows lie, by their names.

    A tensor of the same shape as `input_ids` has an entry for each token without being named here.
    """

    tokens: frozenset[str] = frozenset({"cross_attention_mask"})
    """Of tensors whose axis 1 counts tokens, those with further axes."""

    fills: Mapping[str, Fill] = field(default_factory=dict)
    """What text behind the prompt gets, where it is not 0."""

    ragged: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Axes that may differ between rows, where the model passes over zeros at their end."""

    pads_exactly: bool = True
    """Whether rows that differ in such axes are answered together as alone; else only training joins them."""

    whole_rows: frozenset[str] = frozenset()
    """Tensors of images that have an entry for each row, of zeros for one without images."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of the models of a family; by default what holds for any: they run whole rows.

    What a processor or a config tells is not repeated here. A family says what more it takes to give the
    answers of `generate`, and tests/families show that it does.
    """

    model_types: tuple[str, ...] = ()
    """As configs name them."""

    needs: tuple[str, ...] = ()
    """Packages without which its processor does not load."""

    chat_template: str | None = None
    """For checkpoints without one."""

    end_token: str | None = None
    """What ends an answer; None: what the chat template writes, else what the generation config names."""

    layout: Layout = Layout()

    lora: Mapping[str, str] = field(default_factory=dict)
    """Patterns of module names in the place of those for any model: of its `language`, `vision`, `merger`."""

    shares_prefix: bool = False
    """Whether copied and selected rows of the cache give the answers of whole rows."""

    takes_image_features: bool = False
    """Whether the model takes what `vision_tower` made of images in the place of pixels."""

    packs_attention: bool = False
    """Whether the tower passes windows and images to its attention function packed."""

    @property
    def is_tested(self) -> bool:
        """Whether it is a family of its own, and not what holds for any."""
        return bool(self.model_types)

    def prepare(self, model: Any) -> None:
        """Make a model faster that was just loaded; what it computes stays the same."""
        from vlmray.models.families.patch_embedding import embed_patches_by_matmul

        embed_patches_by_matmul(model)

    def vision_tower(self, model: Any) -> Any:
        """Return the part that makes features of images, whatever projects them included."""
        if not self.takes_image_features:
            raise NotImplementedError(f"nothing is known of the vision tower of {type(model).__name__}")
        return model.model.visual

    def keep_rows(self, model: Any, kept: Any) -> None:
        """Keep some rows, by their places (B,), of what a base model remembers beside its cache.

        That is how far positions are behind lengths where an image takes few positions.
        """
        behind = getattr(model.model, "rope_deltas", None)
        if behind is not None:
            model.model.rope_deltas = behind[kept]

    def counts_positions(self, model: Any) -> bool:
        """Tell whether a model finds the positions of a padded row by itself."""
        return hasattr(model.model, "rope_deltas")
