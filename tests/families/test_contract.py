"""What holds for every family: it is asked, answered and trained as its model card says.

The reference is what cards tell people to do: `processor.apply_chat_template(messages with images,
tokenize=True)` and `model.generate`, one row at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.families.contract import (
    PADS_INEXACTLY,
    WITHOUT_MERGER,
    WITHOUT_TEXT_ONLY,
    Checkpoint,
    ask,
    inputs_by_the_card,
    mixed_requests,
    sample,
    special_tokens,
    text_by_the_card,
)
from helpers.families.serving import body_of, infer, serve
from helpers.finetuning import make_config, train
from vlmray.engines.rows import end_ids
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.engines.transformers.forward import Forward
from vlmray.models.families import family_of
from vlmray.models.loading import generate_text_from_sample, load_qwen_vl_model_and_processor
from vlmray.models.merging import merge_adapter
from vlmray.models.prompts import ChatPrompts
from vlmray.serving import replica
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.vision_cache import VisionCache


@pytest.fixture(scope="module")
def expected(tiny: Checkpoint) -> list[str]:
    """Answers by the card; they depend on question and image, or the tests would see little."""
    texts = [text_by_the_card(tiny, request) for request in mixed_requests(tiny)]
    assert len(set(texts)) >= len(texts) / 2
    return texts


@pytest.fixture(scope="module")
def engine(tiny: Checkpoint) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny.model, tiny.processor, batch_size=5)
    yield engine
    engine.close()


def collator_of(tiny: Checkpoint) -> DataCollatorForVLMSFT:
    ends = end_ids(tiny.model.generation_config)
    return DataCollatorForVLMSFT(tiny.processor, family=tiny.family, end_ids=ends)


def answers(engine: TransformersEngine, requests: Any) -> list[str]:
    completions = engine.generate(requests)
    assert [completion.error for completion in completions] == [None] * len(requests)
    return [completion.text for completion in completions]


def test_it_is_found_by_its_config(tiny: Checkpoint) -> None:
    assert family_of(tiny.model.config) is family_of(tiny.model.config.to_dict()) is tiny.family


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_its_inputs_are_those_of_the_card(tiny: Checkpoint, num_images: int) -> None:
    if num_images == 0 and tiny.name in WITHOUT_TEXT_ONLY:
        pytest.skip("its processor wants an image")
    request = ask(0, *range(num_images))
    prompts = ChatPrompts(tiny.processor)
    prompt = prompts.render(request.messages, add_generation_prompt=True)
    images: list[Any] = list(request.images)
    found, expected = prompts.encode(prompt, images), inputs_by_the_card(tiny, request)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(prompts.tokenize(prompt)) <= found["input_ids"].shape[1]


def test_its_answers_are_those_of_the_card_at_any_batch_size(
    tiny: Checkpoint, engine: TransformersEngine, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    prefill = Forward._prefill

    def count(self: Forward, rows: Any, cache: Any) -> Any:
        shared.append(len(rows))
        return prefill(self, rows, cache)

    monkeypatch.setattr(Forward, "_prefill", count)
    requests = mixed_requests(tiny)
    assert answers(engine, requests) == expected
    assert bool(shared) == tiny.family.shares_prefix == engine.forward.copies_rows
    monkeypatch.setattr(engine.batcher, "batch_size", 1)
    assert answers(engine, requests) == expected
    plain = generate_text_from_sample(tiny.model, tiny.processor, requests[2], max_new_tokens=5)
    assert plain[0] == expected[2]


def test_a_server_answers_as_infer_does(
    tiny: Checkpoint, engine: TransformersEngine, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica.serve, "multiplexed", lambda load, **options: load)  # without Ray
    monkeypatch.setattr(replica, "load_engine", lambda *args, **options: engine)
    bodies = [body_of(tiny, request) for request in mixed_requests(tiny)]
    assert infer(engine, bodies) == serve(tiny, bodies) == expected


def test_special_tokens_in_a_text_harm_no_neighbour(
    tiny: Checkpoint, engine: TransformersEngine, expected: list[str]
) -> None:
    tokens = special_tokens(tiny.processor)
    forged = [ask(20, 0, text=f"What is {token}?", max_new_tokens=2) for token in (*tokens, " ".join(tokens))]
    neighbours = mixed_requests(tiny)
    completions = engine.generate([*neighbours, *forged])
    assert [completion.text for completion in completions[: len(neighbours)]] == expected
    assert [completion.error for completion in completions[len(neighbours) :]] == [None] * len(forged)


def test_an_answer_is_taught_with_its_end_and_nothing_else(tiny: Checkpoint) -> None:
    collator = collator_of(tiny)
    feature = sample(0, "2 people", 0)
    row = collator.encode(feature["messages"], feature["images"])
    asked = inputs_by_the_card(tiny, ask(0, 0))["input_ids"]
    length = asked.shape[1]
    assert torch.equal(row["input_ids"][:, :length], asked)
    assert set(row["labels"][0, :length].tolist()) == {-100}
    taught = row["labels"][0, length:].tolist()
    assert taught == row["input_ids"][0, length:].tolist()
    assert taught[-1] in end_ids(tiny.model.generation_config)
    assert not end_ids(tiny.model.generation_config) & set(taught[:-1])
    assert tiny.processor.tokenizer.decode(taught, skip_special_tokens=True) == "2 people"


def test_an_answer_sees_nothing_behind_it(tiny: Checkpoint) -> None:
    feature = sample(0, "2 people", 0)
    row = collator_of(tiny).encode(feature["messages"], feature["images"])
    row.pop("labels")
    other = {**row, "input_ids": row["input_ids"].clone()}
    other["input_ids"][0, -1] = tiny.processor.tokenizer.pad_token_id + 30
    with torch.no_grad():
        before, after = (tiny.model(**inputs).logits[:, :-1] for inputs in (row, other))
    assert torch.equal(before, after)


def test_rows_of_any_images_train_together_as_alone(tiny: Checkpoint) -> None:
    collator = collator_of(tiny)
    features = [sample(0, "red", 0), sample(1, "2 people", 1), sample(4, "yes", 2)]
    others = [sample(2, "no", 1, 2), sample(3, "blue")][: 1 if tiny.name in WITHOUT_TEXT_ONLY else 2]
    batch = collator([*features, *others])
    assert collator.errors == {}
    if tiny.name in PADS_INEXACTLY:
        assert tiny.model(**batch).loss.isfinite()
        batch = collator(features)
    else:
        features += others
    with torch.no_grad():
        losses = [tiny.model(**collator([feature])).loss for feature in features]
        counts = [int((collator([feature])["labels"][:, 1:] != -100).sum()) for feature in features]
        together = tiny.model(**batch).loss
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert together.item() == pytest.approx(mean.item(), rel=1e-4)


def test_images_that_were_kept_encoded_train_as_pixels_do(tiny: Checkpoint) -> None:
    tiny.model.requires_grad_(False)
    cache = VisionCache.of(tiny.model, 1e9)
    assert (cache is not None) == tiny.family.takes_image_features
    if cache is None:
        return
    features = [sample(0, "red", 0), sample(2, "no", 1, 2), sample(3, "blue")]
    expected = tiny.model(**collator_of(tiny)(features)).loss
    collator = collator_of(tiny)
    collator.vision_cache = cache
    for num_encoded in (3, 3):
        found = tiny.model(**cache.encode(collator(features))).loss
        assert (cache.num_encoded, collator.errors) == (num_encoded, {})
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.usefixtures("spare_time")
def test_every_part_of_an_adapter_learns_is_kept_and_merged(tiny: Checkpoint, tmp_path: Path) -> None:
    config = make_config(
        tiny.folder,
        sample_slices="[:2]",
        max_steps=1,
        save_steps=1,
        max_pixels=None,
        learning_rate=0.1,
        lora_vision=True,
        lora_merger=tiny.name not in WITHOUT_MERGER,
    )
    outcome = train(config, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    moved = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
    assert (outcome.errors, len(moved)) == ({}, len(outcome.targets))
    parts = ["language_model|text_model", "vision|visual"]
    parts += ["merger|projector|connector|embed_vision|projection"] if config.lora_merger else []
    for part in parts:
        assert any(re.search(part, name) for name in outcome.targets), part
    batch = collator_of(tiny)([sample(0, "red", 0), sample(2, "2 people", 1)])
    batch.pop("labels")
    kept, _ = load_qwen_vl_model_and_processor(str(tiny.folder), adapter=str(tmp_path / "adapter"))
    folder = merge_adapter(str(tiny.folder), str(tmp_path / "adapter"), tmp_path / "merged")
    merged, _ = load_qwen_vl_model_and_processor(str(folder))
    with torch.no_grad():
        base, expected, found = (model(**batch).logits for model in (tiny.model, kept, merged))
    assert not torch.allclose(base, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
