"""Samples to training batches: answers are supervised, everything else is context.

    feature -> checks -> segments (prompt, answer, next question, answer, ...) -> row -> right-padded batch

The first segment goes through the processor just as inference sends it, so what is trained is what will be
asked. Every answer is tokenized on its own, as the model will write it, with its end token behind it. A
row that cannot be trained on is left out and named, never cut: images and their placeholders would no
longer match, and half an answer teaches the model to ramble.

It covers images and text. Packing several samples into one row it does not.

Shapes: `B` rows, `T` tokens of the longest, `P` patches or images of all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

from vlmray.dataset.prompts import format_qwen_vl_messages
from vlmray.errors import OptionError, one_line
from vlmray.models.families import ANY
from vlmray.models.families.answers import Answers
from vlmray.models.families.base import Family
from vlmray.models.inputs import IGNORED_LABEL, chain_segments, join_rows
from vlmray.models.prompts import ChatPrompts, match_any
from vlmray.schema import parts_of, text_of
from vlmray.training.vision_cache import VisionCache

_IMAGE_TYPES = ("image", "image_url")


class _Part(NamedTuple):
    """A stretch of a conversation that is encoded by itself."""

    text: str
    images: Sequence[Image.Image] = ()
    is_answer: bool = False


class DataCollatorForVLMSFT:
    r"""Makes training batches of conversations with images, with labels on the answers only.

    A feature is `{"sample_id": ..., "messages": [...], "images": [...]}`: messages as
    `vlmray.dataset.prompts.format_data(..., with_answer=True)` writes them, with one or several assistant
    turns, and an RGB image for each placeholder, in order. Or `{"sample_id": ..., "error": "..."}`, a row
    that failed before it came here. Or None, an empty slot.

    Rows that cannot be trained on are left out and recorded in `errors`. If nothing is left, the batch is
    one stand-in with an image and no label, so that workers that train together stay in step.

    >>> from vlmray.models.processors import load_processor
    >>> from vlmray.models.source import resolve_model_id
    >>> processor = load_processor(resolve_model_id("tiny-random"))
    >>> collator = DataCollatorForVLMSFT(processor)
    >>> messages = [
    ...     {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
    ...     {"role": "assistant", "content": [{"type": "text", "text": "2 people"}]},
    ... ]
    >>> feature = {"sample_id": "train-000000", "messages": messages, "images": [Image.new("RGB", (84, 56))]}
    >>> batch = collator([feature, {"sample_id": "train-000001", "error": "no such file"}, None])
    >>> for name in ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw"):
    ...     print(name, *batch[name].shape)
    input_ids 1 37
    attention_mask 1 37
    labels 1 37
    pixel_values 24 1176
    image_grid_thw 1 3
    >>> processor.tokenizer.decode(batch["input_ids"][0, -7:])
    '<|im_start|>assistant\n2 people<|im_end|>'
    >>> batch["input_ids"][0, -7:].tolist()
    [506, 459, 198, 17, 357, 385, 504]
    >>> batch["labels"][0, -7:].tolist()
    [-100, -100, -100, 17, 357, 385, 504]
    >>> collator.errors
    {'train-000001': 'no such file'}

    Args:
        processor: Of the model to train, as `vlmray.models.processors.load_processor` gives it.
        family: What is known of the model.
        end_ids: Tokens that end the model's answers, where its chat template writes none.
        max_length: Most tokens of a row, visual ones included; None sets no limit.
        max_model_len: Positions that the model has; None where that is not known.
        vision_cache: Has the features of images that were encoded before; their pixels stay out of the batch,
            which is then one for `VisionCache.encode`. None: pixels of all images.
        errors: What `errors` begins with, of rows that were left out before.
        train_on: Which answers of a conversation are supervised: all, or the last alone.

    Raises:
        ValueError: `max_length` below 1, or a tokenizer without a padding token.
    """

    errors: dict[str, str]
    """Why rows were left out, by sample id. It fills in the process that calls the collator, which is not
    this one where a data loader has workers of its own."""

    def __init__(
        self,
        processor: Any,
        *,
        family: Family = ANY,
        end_ids: Collection[int] = (),
        max_length: int | None = None,
        max_model_len: int | None = None,
        vision_cache: VisionCache | None = None,
        errors: Mapping[str, str] | None = None,
        train_on: Literal["all", "last"] = "all",
    ) -> None:
        if max_length is not None and max_length < 1:
            raise OptionError("max_length", f"must be at least 1, got {max_length}")
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set processor.tokenizer.pad_token")
        self.processor = processor
        self.max_length = max_length
        self.max_model_len = max_model_len
        self.vision_cache = vision_cache
        self.errors = dict(errors or {})
        self.train_on = train_on
        self.num_encoded = 0
        """Samples that could be trained on so far."""

        self._layout = family.layout
        self._prompts = ChatPrompts(processor)
        self._answers = Answers(self._prompts, processor.tokenizer, family, end_ids)
        self._special_token = match_any(self._prompts.special_tokens)

    def __call__(self, features: Sequence[Mapping[str, Any] | None]) -> dict[str, torch.Tensor]:
        """Make a batch of the features that can be trained on, in order, and record the others.

        Returns:
            `input_ids`, `attention_mask`, `labels` and what else the processor gives for each token, (B, T);
            `pixel_values`, `image_grid_thw` or what the processor gives for images instead, (P, ...).

        Raises:
            ValueError: Rows that are good alone, but whose image tensors cannot share a batch.
        """
        rows = [self._encode_or_record(feature) for feature in features if feature is not None]
        usable = [row for row in rows if row is not None]
        self.num_encoded += len(usable)
        pad_id = self.processor.tokenizer.pad_token_id
        return join_rows(usable or [self._stand_in()], pad_id=pad_id, side="right", layout=self._layout)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]
    ) -> dict[str, torch.Tensor]:
        """Encode one conversation, labels included.

        Args:
            messages: Turns of which the last is an assistant's; every assistant turn is supervised,
                or the last.
            images: RGB images, one for each placeholder, in order.

        Returns:
            Token-wise tensors (1, T), the images' tensors (P, ...). Labels are -100 but on each answer and
            its end token, and the last end token is the last token.

        Raises:
            ValueError: The conversation, its images or the chat template do not allow training, or the
                row is longer than `max_length` or the model's positions. For a broken image the processor
                may raise others.
        """
        turns = _copy_messages(messages)
        self._check_conversation(turns, images)
        parts: list[_Part] = []
        start, done, unseen = 0, "", list(images)
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        for place in places if self.train_on == "all" else places[-1:]:
            num_images = _count_images(turns[start:place])
            prompt = self._prompts.render(turns[:place], add_generation_prompt=True)
            text = self._answers.text_between(done, prompt, turns[:place])
            answer = self._answers.write(text_of(turns[place]))
            parts += [_Part(text, unseen[:num_images]), _Part(answer, is_answer=True)]
            start, done, unseen = place + 1, done + text + answer, unseen[num_images:]
        row = chain_segments(self._encode_parts(parts), self._layout)
        self._check_length(row)
        return row

    def _encode_or_record(self, feature: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        reason = feature.get("error")
        if not reason:
            try:
                return self.encode(feature["messages"], feature.get("images") or [])
            except Exception as error:  # whatever a processor raises, it is about this row
                kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
                reason = one_line(f"{kind}{error}", 500)
        self.errors[feature["sample_id"]] = reason
        return None

    def _stand_in(self) -> dict[str, torch.Tensor]:
        """Return a small row with an image and nothing to learn."""
        messages = format_qwen_vl_messages("What is this?")
        prompt = self._prompts.render(messages, add_generation_prompt=True)
        row = self._encode_text(prompt, [Image.new("RGB", (56, 56))])
        return {**row, "labels": torch.full_like(row["input_ids"], IGNORED_LABEL)}

    def _encode_text(
        self, text: str, images: Sequence[Image.Image], *, continues: bool = False
    ) -> dict[str, torch.Tensor]:
        if self.vision_cache is None:
            return self._prompts.encode(text, images, continues=continues)
        return self.vision_cache.encode_text(self._prompts, text, images, continues=continues)

    def _encode_parts(self, parts: Sequence[_Part]) -> list[dict[str, torch.Tensor]]:
        """Encode a question, its answer, the next question and so on, each by itself.

        What stands between two answers is the end of a turn, the next question and the next prompt.
        """
        # All texts in one call: the calls take longer than the tokens.
        plain = iter(self._tokenize([part for part in parts[1:] if not part.images]))
        segments = [self._encode_text(parts[0].text, parts[0].images)]
        for part in parts[1:]:
            if part.images:
                segments.append(self._encode_text(part.text, part.images, continues=True))
                continue
            segment = next(plain)
            segments.append({**segment, "labels": segment["input_ids"]} if part.is_answer else segment)
        return segments

    def _tokenize(self, parts: Sequence[_Part]) -> Iterator[dict[str, torch.Tensor]]:
        """Turn texts into ids (1, T) without tokens that start or end a sequence.

        What stands behind an answer is read behind its end token: alone, some tokenizers put a space before.
        """
        before = self._answers.end_token if parts else ""
        texts = [part.text if part.is_answer else before + part.text for part in parts]
        tokenizer = self._prompts.processor_for(*texts).tokenizer
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for part, row in zip(parts, rows, strict=True):
            ids = torch.tensor([row if part.is_answer or not before else row[1:]], dtype=torch.long)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _check_conversation(self, turns: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> None:
        roles = [turn["role"] for turn in turns]
        if roles[-1:] != ["assistant"] or "user" not in roles[: roles.index("assistant")]:
            raise ValueError(
                "a conversation to train on has a user turn before its first assistant turn and ends with "
                f"an assistant turn; this one has the turns: {', '.join(roles) or 'none'}"
            )
        for turn in turns:
            self._check_turn(turn)
        for image in images:
            if not isinstance(image, Image.Image):  # a processor would fetch what a string names
                raise ValueError(f"decoded images are needed, found {type(image).__name__}; open it with PIL")
        if _count_images(turns) != len(images):
            raise ValueError(
                f"the messages have {_count_images(turns)} image places for {len(images)} images"
            )

    def _check_turn(self, turn: dict[str, Any]) -> None:
        is_answer = turn["role"] == "assistant"
        allowed = ("text",) if is_answer else ("text", *_IMAGE_TYPES)
        for part in parts_of(turn):
            if part["type"] not in allowed:
                raise ValueError(
                    f"the {turn['role']} turn has a part of type {part['type']!r}; "
                    f"possible there: {', '.join(allowed)}"
                )
        text = text_of(turn)
        if is_answer and not text.strip():
            raise ValueError("empty answer")
        if is_answer and (found := self._special_token.search(text)):
            raise ValueError(
                f"an answer holds the special token {found[0]!r}; remove it or leave the row out"
            )

    def _check_length(self, row: dict[str, torch.Tensor]) -> None:
        length = row["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"{length} tokens, and --max_length allows {self.max_length}; "
                "raise --max_length or lower --max_pixels"
            )
        if self.max_model_len is not None and length > self.max_model_len:
            raise ValueError(
                f"{length} tokens, and the model has {self.max_model_len} positions; lower --max_pixels or "
                "shorten the row"
            )


def _copy_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages down to their parts, because the template call rewrites them.

    Keys that hold None are dropped: Arrow gives all parts of a column the same keys, and templates take
    a part that has the key `image` for an image.
    """
    copies = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{key: value for key, value in part.items() if value is not None} for part in content]
        copies.append({**message, "content": content})
    return copies


def _count_images(turns: Sequence[Mapping[str, Any]]) -> int:
    return sum(part["type"] in _IMAGE_TYPES for turn in turns for part in parts_of(turn))
