"""Features for the collator, and what every row of its batches holds to."""

from __future__ import annotations

import copy
import random
import string
import unicodedata
from typing import Any

import numpy as np
import torch
from PIL import Image

END = "<|im_end|>"
# Characters that compose, other scripts, quotes, and what looks like chat format or Jinja but is not.
OTHERS = (
    "é ü e\u0301 \u0301 \u212b ﬁ 你好 数 שלום 🙂 👩‍🔬 € ½ “ 2,008 <|im im_end|> <image> </s> {{x}} {%if%}"
)
PIECES = [
    *(string.ascii_letters + string.digits + string.punctuation),
    *OTHERS.split(),
    *(" ", "  ", "\n", "\t", " 12.5%", "assistant\n", "chart", " value"),
]


def random_text(rng: random.Random) -> str:
    """Text that is not blank and may begin or end with whitespace."""
    return (
        "".join(rng.choices(PIECES, k=rng.randint(1, 25)))
        + rng.choice("aé7?")
        + rng.choice(["", "", " ", "\n"])
    )


def random_image(rng: random.Random) -> Image.Image:
    """A picture of 28 to 400 pixels a side, rather small than large."""
    coarse = np.frombuffer(rng.randbytes(5 * 4 * 3), np.uint8).reshape(5, 4, 3)
    size = [int(28 * (400 / 28) ** rng.random() ** 1.3) for _ in range(2)]
    return Image.fromarray(coarse).resize((size[0], size[1]), Image.Resampling.NEAREST)


def turn(role: str, text: str, num_images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def random_feature(rng: random.Random, name: str, max_turns: int = 4) -> dict[str, Any]:
    """A conversation of questions and answers about no, one or two images each."""
    system = rng.choice([[], [], [turn("system", random_text(rng))]])
    counts = [rng.choice([0, 1, 1, 2]) if place == 0 else rng.choice([0, 0, 1]) for place in range(max_turns)]
    counts = counts[: rng.randint(1, max_turns)]
    messages = [*system]
    for count in counts:
        messages += [turn("user", random_text(rng), count), turn("assistant", random_text(rng))]
    return {
        "sample_id": name,
        "messages": messages,
        "images": [random_image(rng) for _ in range(sum(counts))],
    }


def make_features(count: int, *, seed: int = 0, max_turns: int = 4) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [random_feature(rng, f"train-{number:06d}", max_turns) for number in range(count)]


def answers_of(feature: dict[str, Any]) -> list[str]:
    return [turn["content"][0]["text"] for turn in feature["messages"] if turn["role"] == "assistant"]


def feature_of(*texts: str, images: int = 0, name: str = "train-000000") -> dict[str, Any]:
    """Question, answer, question, answer, ... with all images in the first question."""
    roles = ["user", "assistant"] * len(texts)
    messages = [turn(role, text) for role, text in zip(roles, texts, strict=False)]
    messages[0]["content"][:0] = [{"type": "image"}] * images
    rng = random.Random(name)
    return {"sample_id": name, "messages": messages, "images": [random_image(rng) for _ in range(images)]}


def supervised_spans(ids: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
    """Return the runs of tokens that have a label."""
    spans: list[list[int]] = []
    for place, (token, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        if label == -100:
            continue
        assert label == token
        if place == 0 or labels[place - 1] == -100:
            spans.append([])
        spans[-1].append(token)
    return spans


def check_row(processor: Any, feature: dict[str, Any], batch: dict[str, torch.Tensor], index: int) -> None:
    """Check one row of a batch against its feature."""
    ids, mask, labels = (batch[name][index] for name in ("input_ids", "attention_mask", "labels"))
    length = int(mask.sum())
    assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
    assert set(ids[length:].tolist()) <= {processor.tokenizer.pad_token_id}
    assert set(labels[length:].tolist()) <= {-100}
    assert processor.tokenizer.decode(ids[length - 1]) == END
    # Qwen's tokenizer composes characters before it splits text, at inference as well.
    expected = [unicodedata.normalize("NFC", answer) + END for answer in answers_of(feature)]
    spans = supervised_spans(ids, labels)
    assert [processor.tokenizer.decode(span) for span in spans] == expected
    check_prompts(processor, feature, ids[:length], labels[:length])


def check_prompts(processor: Any, feature: dict[str, Any], ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Check that what stands before the last answer, earlier turns included, is what inference would ask.

    A line break that starts an answer is a token of its own when the model writes it, but is joined to the
    one before it when the answer is history in a later prompt; so no answer like that may be history here.
    """
    is_context = [label == -100 for label in labels.tolist()]
    starts = [n for n in range(1, len(ids)) if is_context[n - 1] and not is_context[n]]
    places = [place for place, turn in enumerate(feature["messages"]) if turn["role"] == "assistant"]
    joins = [answer[0].isspace() for answer in answers_of(feature)]
    last = joins.index(True) if True in joins else len(joins) - 1
    messages = copy.deepcopy(feature["messages"][: places[last]])
    asked = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = feature["images"][: asked.count("<|image_pad|>")]
    inputs = processor(text=[asked], images=images or None, return_tensors="pt")
    assert ids[: starts[last]].tolist() == inputs["input_ids"][0].tolist()
