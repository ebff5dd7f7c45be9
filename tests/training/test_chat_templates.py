"""Chat templates that teach what inference asks, and those that cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.collating import END, check_prompts, feature_of, supervised_spans
from vlmray.models.families import ANY
from vlmray.models.families.base import Family
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
    ("body", "between"),
    [
        # LLaVA 1.5 ends an answer with a space and no token.
        ("{{- text + (' ' if message.role == 'assistant' else '<|im_end|>\\n') -}}", " "),
        # Reasoning models write a block of thoughts before an answer that is history.
        ("{{- '<think></think>' if message.role == 'assistant' -}}{{- text + '<|im_end|>\\n' -}}", "\n"),
        ("{{- text + ('<|im_end|>' if loop.last or message.role == 'user' else '') -}}", ""),
    ],
)
def test_answers_stand_behind_prompts_whatever_the_template_makes_of_history(
    processor: Any, with_template: Any, body: str, between: str
) -> None:
    other = with_template(QWEN_HEAD + body + QWEN_TAIL)
    feature = feature_of("How many?", "yes", "Sure?", "no", images=1)
    row = DataCollatorForVLMSFT(other).encode(feature["messages"], feature["images"])
    spans = supervised_spans(row["input_ids"][0], row["labels"][0])
    assert [processor.tokenizer.decode(span) for span in spans] == ["yes" + END, "no" + END]
    asked = other.apply_chat_template(feature["messages"][:1], add_generation_prompt=True)
    ends = other.apply_chat_template(feature["messages"][2:3], add_generation_prompt=True)
    inputs = processor(text=[asked], images=feature["images"], return_tensors="pt")["input_ids"][0]
    text = processor.tokenizer.decode(row["input_ids"][0, len(inputs) :])
    assert row["input_ids"][0, : len(inputs)].tolist() == inputs.tolist()
    assert text == f"yes{END}{between}{ends}no{END}"


def test_without_an_end_token_of_the_template_that_of_the_model_is_taught(
    processor: Any, with_template: Any
) -> None:
    other = with_template(QWEN_HEAD + "{{- text + ' ' -}}" + QWEN_TAIL)
    ends = {
        "<|endoftext|>": (ANY, ["<|endoftext|>", "How"]),
        END: (ANY, ["<|endoftext|>", END]),  # the tokenizer's, among several
        "<|im_start|>": (Family(end_token="<|im_start|>"), ["<|endoftext|>"]),
    }
    for expected, (family, tokens) in ends.items():
        ids = processor.tokenizer.convert_tokens_to_ids(tokens)
        collator = DataCollatorForVLMSFT(other, family=family, end_ids=ids)
        row = collator.encode(feature_of("How many?", "yes")["messages"], [])
        [span] = supervised_spans(row["input_ids"][0], row["labels"][0])
        assert processor.tokenizer.decode(span) == "yes" + expected


def test_an_answer_ends_where_the_model_stops(processor: Any, with_template: Any) -> None:
    other = with_template(QWEN_HEAD + "{{- text + '<|vision_end|><|im_end|>' -}}" + QWEN_TAIL)
    ids = processor.tokenizer.convert_tokens_to_ids([END])
    row = DataCollatorForVLMSFT(other, end_ids=ids).encode(feature_of("How many?", "yes")["messages"], [])
    [span] = supervised_spans(row["input_ids"][0], row["labels"][0])
    assert processor.tokenizer.decode(span) == f"yes<|vision_end|>{END}"


def test_a_template_that_rewrites_answers_is_refused_for_several_turns(with_template: Any) -> None:
    body = "{{- (text if loop.last else 'shorter') + '<|im_end|>' -}}"
    collator = DataCollatorForVLMSFT(with_template(QWEN_HEAD + body + QWEN_TAIL))
    with pytest.raises(ValueError, match="does not keep the answer 'yes' when the next question comes"):
        collator.encode(feature_of("How many?", "yes", "Sure?", "no")["messages"], [])
    collator.encode(feature_of("How many?", "yes")["messages"], [])


def test_an_answer_stands_behind_a_thought_that_the_prompt_opens(processor: Any, with_template: Any) -> None:
    opening = QWEN_TAIL.replace("assistant\\n", "assistant\\n<think>\\n")
    other = with_template(QWEN_HEAD + "{{- text + '<|im_end|>' -}}" + opening)
    row = DataCollatorForVLMSFT(other).encode(feature_of("How many?", "yes")["messages"], [])
    assert processor.tokenizer.decode(row["input_ids"][0]).endswith("assistant\n<think>\nyes" + END)


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


def test_what_follows_an_answer_is_read_as_there(tiny_model: Path) -> None:
    from tokenizers import pre_tokenizers

    processor = load_processor(str(tiny_model))
    processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    feature = feature_of("How many?", "2,008", "Sure?", "yes")
    row = DataCollatorForVLMSFT(processor).encode(feature["messages"], [])
    asked = processor.apply_chat_template(feature["messages"][2:3], add_generation_prompt=True)
    question = "\n" + asked[asked.index("<|im_start|>user") :]
    alone = processor.tokenizer(question)["input_ids"]
    behind = processor.tokenizer(END + question)["input_ids"][1:]
    is_context = (row["labels"][0] == -100).tolist()
    starts = [n for n in range(1, len(is_context)) if is_context[n - 1] != is_context[n]]
    found = row["input_ids"][0, starts[1] : starts[2]].tolist()
    assert found == behind != alone
