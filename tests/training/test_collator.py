"""What the model is taught: exactly the answers, after the prompts of inference, with their own images."""

from __future__ import annotations

import copy
import io
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from helpers.collating import (
    END,
    answers_of,
    check_row,
    feature_of,
    make_features,
    random_image,
    turn,
)
from helpers.paths import REAL_PROCESSOR, needs_real_processor
from vlmray.dataset.prompts import format_data
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.models.processors import load_processor
from vlmray.schema import GenerationRequest, Sample
from vlmray.training.collator import DataCollatorForVLMSFT


def half_an_image() -> Image.Image:
    """A file that opens and turns out to be broken when its pixels are read."""
    file = io.BytesIO()
    random_image(random.Random(0)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=needs_real_processor)])
def any_processor(request: pytest.FixtureRequest, processor: Any) -> Any:
    return processor if request.param == "tiny" else load_processor(str(REAL_PROCESSOR))


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
        sample_id="test-000000", question="Which color is highest?", answers=("red",), images=("a.png",)
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
