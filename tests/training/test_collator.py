"""What the model is taught: exactly the answers, after the prompts of inference, with their own images."""

from __future__ import annotations

import copy
import io
import random
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from helpers.paths import REAL_PROCESSOR
from vlmray.dataset.prompts import format_data
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest, Sample
from vlmray.training.collator import DataCollatorForVLMSFT

needs_real_processor = pytest.mark.skipif(
    not REAL_PROCESSOR.is_dir(), reason=f"the real Qwen2.5-VL processor files are not at {REAL_PROCESSOR}"
)

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


def half_an_image() -> Image.Image:
    """A file that opens and turns out to be broken when its pixels are read."""
    file = io.BytesIO()
    random_image(random.Random(0)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


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


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=needs_real_processor)])
def any_processor(request: pytest.FixtureRequest, processor: Any) -> Any:
    return processor if request.param == "tiny" else load_processor(str(REAL_PROCESSOR))


@pytest.fixture
def with_template(processor: Any) -> Callable[[str], Any]:
    """A processor with another chat template."""

    def make(template: str) -> Any:
        other = copy.copy(processor)
        other.chat_template = template
        return other

    return make


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


def test_labels_are_the_answers_and_prompts_are_those_of_inference(any_processor: Any) -> None:
    collator = DataCollatorForVLMSFT(any_processor)
    features = make_features(200 if any_processor.tokenizer.vocab_size < 1000 else 80)
    rng = random.Random(1)
    given = copy.deepcopy([feature["messages"] for feature in features])
    start = 0
    while start < len(features):
        chosen = features[start : start + rng.randint(1, 8)]
        start += len(chosen)
        batch = collator(chosen)
        for index, feature in enumerate(chosen):
            check_row(any_processor, feature, batch, index)
        images = [image for feature in chosen for image in feature["images"]]
        if images:
            expected = any_processor.image_processor(images, return_tensors="pt")
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
            assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
        is_visual = batch["input_ids"] == any_processor.image_token_id
        assert torch.equal(batch["mm_token_type_ids"].bool(), is_visual)
    assert collator.errors == {}
    assert given == [feature["messages"] for feature in features]
    answers = [answer for feature in features for answer in answers_of(feature)]
    assert any(unicodedata.normalize("NFC", answer) != answer for answer in answers)
    assert {len(answers_of(feature)) for feature in features} == {1, 2, 3, 4}


def test_a_row_does_not_depend_on_its_neighbours(processor: Any) -> None:
    collator = DataCollatorForVLMSFT(processor)
    features = make_features(12, seed=3)
    batch = collator(features)
    patches = 0
    images = 0
    for index, feature in enumerate(features):
        alone = collator([feature])
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
            assert torch.equal(batch[name][index, :length], alone[name][0])
        encoded = collator.encode(feature["messages"], feature["images"])
        assert encoded.keys() == alone.keys()
        assert all(torch.equal(encoded[name], alone[name]) for name in alone)
        if feature["images"]:
            num_patches, num_images = len(alone["pixel_values"]), len(feature["images"])
            assert torch.equal(batch["pixel_values"][patches : patches + num_patches], alone["pixel_values"])
            assert torch.equal(batch["image_grid_thw"][images : images + num_images], alone["image_grid_thw"])
            patches, images = patches + num_patches, images + num_images
    assert patches == len(batch["pixel_values"])


def test_the_prompt_is_the_one_that_the_engine_sends(model: Any, processor: Any) -> None:
    sample = Sample(
        sample_id="test-000000", question="Which color is highest?", answers=("red",), image="a.png"
    )
    image = random_image(random.Random(0))
    options: dict[str, Any] = {"system_prompt": "Be brief.", "prompt_template": "{question}\nOne word."}
    row = DataCollatorForVLMSFT(processor).encode(format_data(sample, **options, with_answer=True), [image])
    request = GenerationRequest(
        request_id="a", messages=format_data(sample, **options), images=[image], max_new_tokens=1
    )
    engine = TransformersEngine(model, processor)
    completion = engine.generate([request])[0]
    engine.close()
    asked = processor(text=[completion.prompt], images=[image], return_tensors="pt")
    num_prompt = completion.num_prompt_tokens
    assert torch.equal(row["input_ids"][:, :num_prompt], asked["input_ids"])
    assert torch.equal(row["pixel_values"], asked["pixel_values"])
    assert (row["labels"][0] == -100).tolist() == [True] * num_prompt + [False] * (
        row["labels"].shape[1] - num_prompt
    )


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"error": "the image is no image"}, "the image is no image"),
    (feature_of("Which?", " \n"), "empty answer"),
    (
        feature_of("one <|image_pad|> of my own", "yes"),
        "the text of a user turn holds the special token '<|image_pad|>'",
    ),
    (feature_of("one <|image_pad|> of my own", "yes", images=1), "'<|image_pad|>'; remove it"),
    (feature_of("Which?", "one", "a <|video_pad|>", "two"), "'<|video_pad|>'; remove it"),
    (feature_of("Which?", "red<|im_end|>blue"), "an answer holds the special token '<|im_end|>'"),
    (feature_of("Which?", "<|vision_start|><|image_pad|>"), "an answer holds the special token"),
    ({**feature_of("Which?", "red"), "images": [Image.new("RGB", (60, 60))]}, "0 image places for 1 images"),
    ({**feature_of("Which?", "red", images=2), "images": []}, "2 image places for 0 images"),
    ({**feature_of("A?", "a", images=1), "images": [Image.new("RGB", (6000, 2))]}, "aspect ratio"),
    ({**feature_of("A?", "a", images=1), "images": [half_an_image()]}, "OSError: "),
    (
        {**feature_of("A?", "a", images=1), "images": ["https://a.b/c.png"]},
        "decoded images are needed, found str",
    ),
    (feature_of("Which?"), "ends with an assistant turn; this one has the turns: user"),
    ({"messages": [turn("system", "Hi"), turn("assistant", "yes")]}, "turns: system, assistant"),
    ({"messages": []}, "turns: none"),
    (
        {"messages": [turn("user", "A?"), turn("assistant", "a", 1)], "images": [1]},
        "'image'; possible there: text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, turn("assistant", "yes")]},
        "'audio'; possible there: text, image, image_url",
    ),
    ({"messages": [{"role": "user"}, turn("assistant", "yes")]}, "KeyError: 'content'"),
    (
        feature_of("Which color is highest? " * 60, "red"),
        " tokens, and --max_length allows 400; raise --max_length or lower --max_pixels",
    ),
    (feature_of("Which?", "red " * 400), " tokens, and --max_length allows 400; raise"),
]


@pytest.mark.parametrize(("bad", "reason"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_left_out_and_named(processor: Any, bad: dict[str, Any], reason: str) -> None:
    collator = DataCollatorForVLMSFT(processor, max_length=400)
    good = [feature_of("How many?", "2,008", images=1, name=f"good-{n}") for n in range(2)]
    expected = collator(good)
    assert collator.errors == {}
    batch = collator([good[0], {**bad, "sample_id": "bad"}, None, good[1]])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert list(collator.errors) == ["bad"]
    assert reason in collator.errors["bad"]


def test_the_length_limit_is_met_exactly_and_nothing_is_cut(processor: Any) -> None:
    feature = feature_of("How many?", "2,008", "And in Japan?", "12", images=1)
    row = DataCollatorForVLMSFT(processor).encode(feature["messages"], feature["images"])
    length = row["input_ids"].shape[1]
    same = DataCollatorForVLMSFT(processor, max_length=length).encode(feature["messages"], feature["images"])
    assert torch.equal(same["input_ids"], row["input_ids"])
    with pytest.raises(ValueError, match=f"^{length} tokens, and --max_length allows {length - 1}; "):
        DataCollatorForVLMSFT(processor, max_length=length - 1).encode(feature["messages"], feature["images"])
    with pytest.raises(ValueError, match="--max_length must be at least 1, got 0"):
        DataCollatorForVLMSFT(processor, max_length=0)


@pytest.mark.parametrize("features", [[], [None, None], [{"sample_id": "a", "error": "lost"}, None]])
def test_a_batch_without_a_usable_row_is_a_stand_in_that_teaches_nothing(
    model: Any, processor: Any, features: list[Any]
) -> None:
    batch = DataCollatorForVLMSFT(processor, max_length=1)(features)
    assert set(batch["labels"].flatten().tolist()) == {-100}
    assert len(batch["input_ids"]) == len(batch["image_grid_thw"]) == 1
    assert batch.keys() == DataCollatorForVLMSFT(processor)([feature_of("A?", "a", images=1)]).keys()
    labels = batch.pop("labels")
    logits = model(**batch).logits
    assert logits.isfinite().all()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()


def test_the_model_learns_from_every_answer_and_padding_changes_nothing(model: Any, processor: Any) -> None:
    collator = DataCollatorForVLMSFT(processor)
    features = [
        feature_of("How many?", "2,008", "And in Japan?", "no more than 12", images=2),
        feature_of("Yes or no?", "no", name="text-only"),
        feature_of("Which color?", "red", images=1, name="short"),
    ]
    features[0]["messages"][2]["content"].insert(0, {"type": "image"})  # the second question shows its own
    features[0]["images"].append(random_image(random.Random(5)))
    counts, losses = [], []
    for feature in features:
        row = collator([feature])
        counts.append(int((row["labels"] != -100).sum()))
        losses.append(model(**row).loss.item())
    batch = collator(features)
    loss = model(**batch).loss
    expected = sum(n * value for n, value in zip(counts, losses, strict=True)) / sum(counts)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads.values())
    assert collator.errors == {}


def test_batches_equal_those_of_trl_for_one_question_and_answer(processor: Any) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    ours = DataCollatorForVLMSFT(processor)
    features = make_features(24, seed=7, max_turns=1)
    for start, stop in ((0, 1), (1, 4), (4, 12), (12, 24)):
        rows = [
            {
                "prompt": processor.apply_chat_template(
                    copy.deepcopy(feature["messages"][:-1]), add_generation_prompt=True
                ),
                "completion": answers_of(feature)[0] + END,
                "images": feature["images"],
            }
            for feature in features[start:stop]
        ]
        expected, found = dict(theirs(rows)), ours(features[start:stop])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


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


def test_messages_may_come_as_arrow_or_other_clients_write_them(processor: Any) -> None:
    feature = feature_of("How many?", "2,008", images=1)
    collator = DataCollatorForVLMSFT(processor)
    expected = collator.encode(feature["messages"], feature["images"])
    parts = [
        {"type": "image", "text": None, "image": None},
        {"type": "text", "text": "How many?", "image": None},
    ]
    url = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "How many?"}]
    for content in (parts, url):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "2,008"}]
        before = copy.deepcopy(messages)
        row = collator.encode(messages, feature["images"])
        assert all(torch.equal(row[name], expected[name]) for name in expected)
        assert messages == before


def test_another_processor_family_is_collated_just_as_exactly(processor: Any) -> None:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    llava = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )
    features = make_features(20, seed=11)
    batch = DataCollatorForVLMSFT(llava)(features)
    for index, feature in enumerate(features):
        check_row(llava, feature, batch, index)
    images = [image for feature in features for image in feature["images"]]
    assert torch.equal(
        batch["pixel_values"], llava.image_processor(images, return_tensors="pt")["pixel_values"]
    )
