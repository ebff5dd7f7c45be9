"""Chat templates that teach what inference asks, and those that cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.collating import END, check_prompts, feature_of, supervised_spans
from vlmray.models.processors import load_processor
from vlmray.training.collator import DataCollatorForVLMSFT


@pytest.fixture
def with_template(processor: Any) -> Callable[[str], Any]:
    """A processor with another chat template."""

    def make(template: str) -> Any:
        other = copy.copy(processor)
        other.chat_template = template
        return other

    return make


QWEN_HEAD = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- for part in message.content if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- endfor -%}{%- set text = message.content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join -%}"
)
QWEN_TAIL = "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"


def test_a_template_may_strip_texts_and_end_turns_without_a_line_break(
    processor: Any, with_template: Any
) -> None:
    stripping = with_template(QWEN_HEAD + "{{- text | trim + '<|im_end|>' -}}" + QWEN_TAIL)
    feature = feature_of(" How many?\n", " 2,008 \n", " Sure? ", "\tyes", images=1)
    row = DataCollatorForVLMSFT(stripping).encode(feature["messages"], feature["images"])
    spans = supervised_spans(row["input_ids"][0], row["labels"][0])
    assert [processor.tokenizer.decode(span) for span in spans] == ["2,008" + END, "yes" + END]
    check_prompts(
        stripping,
        feature_of("How many?", "2,008", "Sure?", "yes", images=1),
        *(row[name][0] for name in ("input_ids", "labels")),
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        # LLaVA 1.5 ends an answer with a space.
        ("{{- text + ' ' -}}", "ends an answer with 'yes ' and no end token"),
        # Reasoning models write a block of thoughts before the answer, or into the prompt.
        (
            "{{- '<think></think>' if message.role == 'assistant' -}}{{- text + '<|im_end|>\\n' -}}",
            "for the answer",
        ),
        (
            "{{- text + ('<|im_end|>' if loop.last or message.role == 'user' else '') -}}",
            "no end token|only appends",
        ),
        (
            "{{- (text if loop.last else 'shorter') + '<|im_end|>' -}}",
            "does not continue what it wrote before",
        ),
    ],
)
def test_a_template_that_cannot_teach_what_inference_asks_is_refused(
    with_template: Any, body: str, reason: str
) -> None:
    collator = DataCollatorForVLMSFT(with_template(QWEN_HEAD + body + QWEN_TAIL))
    feature = feature_of("How many?", "yes", "Sure?", "no")
    with pytest.raises(ValueError, match=reason):
        collator.encode(feature["messages"], feature["images"])


def test_a_prompt_that_opens_a_thought_is_refused(with_template: Any) -> None:
    opening = QWEN_TAIL.replace("assistant\\n", "assistant\\n<think>\\n")
    collator = DataCollatorForVLMSFT(with_template(QWEN_HEAD + "{{- text + '<|im_end|>' -}}" + opening))
    with pytest.raises(ValueError, match=r"stood '<think>\\n', and with the next turn 'yes<\|im_end\|>'"):
        collator.encode(feature_of("How many?", "yes")["messages"], [])


def test_a_token_that_starts_a_sequence_stands_once_at_its_start(tiny_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    processor = load_processor(str(tiny_model))
    start = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    feature = feature_of("How many?", "2,008", "And in Japan?", "12", "Sure?", "yes", images=1)
    feature["messages"][2]["content"].insert(0, {"type": "image"})
    feature["images"].append(Image.new("RGB", (60, 90)))
    row = DataCollatorForVLMSFT(processor).encode(feature["messages"], feature["images"])
    assert (row["input_ids"][0] == start).nonzero().tolist() == [[0]]
    check_prompts(processor, feature, row["input_ids"][0], row["labels"][0])
