"""The table of docs/families.md: what the contract test holds of each family."""

from __future__ import annotations

from helpers.families import TINY
from helpers.families.contract import WITHOUT_MERGER, WITHOUT_TEXT_ONLY
from vlmray.models.families import FAMILIES

_HEAD = ("family", "infer", "shared image", "fine-tune", "LoRA parts", "serve", "needs")


def render_table() -> str:
    """Write the table in Markdown."""
    lines = [_HEAD, tuple("---" for _ in _HEAD), *(_row(name) for name in TINY)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(name: str) -> tuple[str, ...]:
    family = FAMILIES[name]
    parts = ["language", "vision", *([] if name in WITHOUT_MERGER else ["merger"])]
    asked = "yes, but text alone" if name in WITHOUT_TEXT_ONLY else "yes"
    return (
        f"`{name}`",
        asked,
        "once" if family.shares_prefix else "each time",
        "yes, pixels kept encoded" if family.takes_image_features else "yes",
        ", ".join(parts),
        asked,
        ", ".join(family.needs) or "-",
    )


if __name__ == "__main__":
    print(render_table(), end="")
