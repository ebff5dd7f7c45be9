"""Cards: the README.md of a repository on the hub, which says what lies in it. No field of it is empty."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmray.publishing.private import public_value, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import CardData

_WHERE = frozenset(
    {
        "output_dir", "push_to_hub", "hub_private_repo", "overwrite", "resume", "dry_run", "log_level",
        "price_per_hour", "report_to", "wait_for_resources_s",
    }
)  # fmt: skip
"""Options that change nothing of a result, and are about one machine, account or contract."""

Facts = Mapping[str, Any]
"""What is known, by what it is; None and what is empty is left out."""


def write_card(metadata: CardData, title: str, lead: str, sections: Mapping[str, str | Facts]) -> str:
    """Write a card.

    Args:
        metadata: Its head, which programs read.
        title: In one line.
        lead: What it is.
        sections: Markdown, or facts, by their titles; empty ones are left out.
    """
    parts = [f"# {title}", lead]
    for name, section in sections.items():
        text = section if isinstance(section, str) else _list(section)
        parts += [f"## {name}", text] if text else []
    head = metadata.to_yaml().strip()
    return without_secrets(f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n")


def code(text: str, language: str = "text") -> str:
    """Set a text as it is, whatever it holds."""
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def command_of(job: str, config: Any) -> str:
    """Write the command of a run, with the options that were given and change its result."""
    words = [f"vlmray {job}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.init and field.name not in _WHERE and value is not None and value != field.default:
            words.append(f"--{field.name} {_word(public_value(value))}")
    return code(" \\\n    ".join(words), "bash")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return shlex.quote(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))


def _list(facts: Facts) -> str:
    return "\n".join(
        f"- **{name}**: {_inline(value)}" for name, value in facts.items() if value not in (None, "", (), [])
    )


def _inline(value: Any) -> str:
    """Put a value on one line; a text of several lines, or with marks of its own, is set as code."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"`{text!r}`" if "\n" in text else " ".join(text.split())
