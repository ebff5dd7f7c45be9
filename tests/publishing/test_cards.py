"""Cards: what is not known is left out, and they are read as they were written."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from vlmray.config import InferConfig
from vlmray.publishing.cards import code, command_of, write_card


def test_nothing_empty_is_written() -> None:
    metadata = ModelCardData(license=None, library_name="peft", tags=["vlmray"])
    facts = {"known": "x", "zero": 0, "unknown": None, "empty": "", "none of them": [], "count": 1234}
    text = write_card(metadata, "Title", "Lead.", {"Facts": facts, "Nothing": {"unknown": None}, "No": ""})
    assert text.endswith(
        "# Title\n\nLead.\n\n## Facts\n\n- **known**: x\n- **zero**: 0\n- **count**: 1,234\n"
    )
    assert ModelCard(text).data.to_dict() == {"library_name": "peft", "tags": ["vlmray"]}


def test_a_text_of_several_lines_stays_one_item() -> None:
    text = write_card(
        ModelCardData(license="mit"), "Title", "Lead.", {"Prompt": {"question": "{question}\nBriefly."}}
    )
    assert text.endswith("- **question**: `'{question}\\nBriefly.'`\n")


def test_code_holds_code() -> None:
    assert code("```\nx\n```") == "````text\n```\nx\n```\n````"


def test_the_command_names_what_counts(tmp_path: Path) -> None:
    config = InferConfig(
        sample_slices="[:5]", model_id=str(tmp_path / "model"), engine="transformers",
        output_dir="/home/jane/x", push_to_hub="jane/x", log_level="DEBUG", seed=0, price_per_hour=2.0,
        system_prompt="It's short.",
        chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    assert command_of("infer", config) == code(
        "vlmray infer \\\n    --model_id model \\\n"
        "    --chat_template_kwargs '{\"enable_thinking\": false}' \\\n"
        "    --system_prompt 'It'\"'\"'s short.' \\\n"
        "    --engine transformers \\\n    --sample_slices '[:5]'",
        "bash",
    )
