"""What goes wrong with some families only, and stays where it went wrong."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from helpers.engines import make_image
from helpers.families import TINY
from helpers.families.building import write
from helpers.families.contract import Checkpoint, ask, mixed_requests, text_by_the_card
from helpers.families.loading import load_tiny
from helpers.finetuning import curve, make_config, open_data, train
from helpers.rows import make_image as rows_image
from vlmray.config import ServeConfig
from vlmray.engines.transformers.batching import count_visual_tokens
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.finetune.plan import settle_batches
from vlmray.models.families import FAMILIES, family_of
from vlmray.models.prompts import ChatPrompts
from vlmray.schema import Completion
from vlmray.serving import replica as module
from vlmray.serving.backend import Reply
from vlmray.serving.replica import ModelReplica

INNER_TOKENS = {"gemma3": "<image_soft_token>", "aya_vision": "<|IMG_PATCH|>"}
"""What their models count as images, beside the placeholders that templates write."""


@pytest.fixture(scope="module", params=INNER_TOKENS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let special tokens in texts through, as if a tokenizer had some that nobody knows of."""
    monkeypatch.setattr(ChatPrompts, "_mark", lambda self, content: content)


@pytest.mark.usefixtures("unmarked")
def test_a_row_that_the_model_raises_for_fails_alone(tiny: Checkpoint) -> None:
    engine = TransformersEngine(tiny.model, tiny.processor, batch_size=16)
    bad = ask(20, 0, text=f"What does {INNER_TOKENS[tiny.name]} mean?")
    good = mixed_requests(tiny)
    expected = engine.generate(good)
    found = engine.generate([*good[:4], bad, *good[4:]])
    engine.close()
    failed = found.pop(4)
    assert found == expected
    assert (failed.finish_reason, failed.text) == ("error", "")
    assert "mage features and image tokens do not match" in str(failed.error)


@pytest.mark.usefixtures("unmarked")
def test_no_request_takes_a_replica_out_of_service(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.serve, "multiplexed", lambda load, **options: load)
    config = ServeConfig(model_id=str(tiny.folder), engine="transformers", max_batch_size=4)
    bad = ask(20, 0, text=f"What does {INNER_TOKENS[tiny.name]} mean?")
    good = [ask(0, 0), ask(1, 1)]

    async def answer(replica: ModelReplica, request: Any) -> Completion:
        pieces = [piece async for piece in replica.answer(request, False)]
        assert isinstance(pieces[-1], Reply)
        return pieces[-1].completion

    async def check() -> None:
        replica = ModelReplica(config)
        found = await asyncio.gather(*(answer(replica, request) for request in (good[0], bad, good[1])))
        assert [each.finish_reason == "error" for each in found] == [False, True, False]
        replica.check_health()
        texts = [(await answer(replica, request)).text for request in good]
        assert texts == [found[0].text, found[2].text] == [text_by_the_card(tiny, each) for each in good]
        replica._engine.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "qwen2_vl",
            {
                "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        ("llava", {"model_type": "mistral", "sliding_window": 16}),  # says nothing of its layers
    ],
)  # fmt: skip
def test_beginnings_are_not_shared_where_a_window_slides(
    name: str, text: dict[str, Any], tmp_path: Path
) -> None:
    tiny = load_tiny(name, tmp_path, **text)
    requests = mixed_requests(tiny)
    engine = TransformersEngine(tiny.model, tiny.processor, batch_size=5)
    found = engine.generate(requests)
    assert tiny.family.shares_prefix
    assert not engine.forward.copies_rows
    assert min(each.num_prompt_tokens for each in found if each.num_prompt_tokens > 20) > 16
    assert [each.text for each in found] == [text_by_the_card(tiny, request) for request in requests]
    engine.close()


def test_what_stands_behind_an_image_is_read_as_there(tmp_path: Path) -> None:
    tiny = load_tiny("llava", tmp_path)
    backend = tiny.processor.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = tiny.processor.tokenizer
    assert tokenizer.tokenize("What?")[0] != tokenizer.tokenize("<image>What?")[1]
    engine = TransformersEngine(tiny.model, tiny.processor, batch_size=5)
    requests = [dataclasses.replace(ask(n, 0, n % 2), images=ask(0, 0, 1).images) for n in range(4)]
    for request in requests:  # the second image is the last of the turn
        request.messages[0]["content"][:] = [request.messages[0]["content"][at] for at in (2, 0, 1)]
    assert engine.forward.copies_rows
    found = [completion.text for completion in engine.generate(requests)]
    assert found == [text_by_the_card(tiny, request) for request in requests]
    engine.close()


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "idefics3", "internvl", "gemma3", "glm4v"])
def test_visual_tokens_are_counted_and_not_guessed(name: str, tmp_path: Path) -> None:
    tiny = load_tiny(name, tmp_path)
    placeholder = "<image_soft_token>" if name == "gemma3" else tiny.processor.image_token
    prompts = ChatPrompts(tiny.processor)
    prompt = prompts.render(ask(0, 0).messages, add_generation_prompt=True)
    for size in ((70, 40), (40, 64), (200, 150)):
        image = make_image(0, size)
        ids = prompts.encode(prompt, [image])["input_ids"]
        found = int((ids == tiny.processor.tokenizer.convert_tokens_to_ids(placeholder)).sum())
        with_frame = ids.shape[1] - len(prompts.tokenize(prompt)) + 1
        assert count_visual_tokens(tiny.processor, image) in (found, with_frame)


@pytest.mark.usefixtures("spare_time")
def test_rows_of_an_unknown_model_train_one_by_one_as_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of unlike sizes have tensors of unlike shapes here, which nobody says how to pad."""
    folder = write(TINY["idefics3"](), tmp_path / "idefics3")
    config = make_config(
        folder, dataset_name="charts?num_rows=8", sample_slices="[:4]", max_steps=2, max_pixels=None,
        per_device_train_batch_size=4, eval_samples=2, eval_slices="[4:6]",
    )  # fmt: skip
    data = open_data(config, {n: {"image": rows_image(n, size=(60 + 70 * n, 50))} for n in range(4)})
    known = train(config, data=data)
    monkeypatch.delitem(FAMILIES, "idefics3")
    with pytest.raises(ValueError, match="cannot share a batch"):
        train(config, data=data)
    settled = settle_batches(config, family_of({"model_type": "idefics3"}))
    assert settled.per_device_train_batch_size == 1
    alone = train(settled, data=data)
    assert (alone.errors, known.errors) == ({}, {})
    assert curve(alone) == pytest.approx(curve(known), rel=1e-4)
    assert curve(alone, "eval_loss") == pytest.approx(curve(known, "eval_loss"), rel=1e-4)


def test_a_checkpoint_without_a_template_has_that_of_its_family(tmp_path: Path) -> None:
    folder = write(TINY["paligemma"](), tmp_path / "paligemma")
    assert not (folder / "chat_template.jinja").exists()
    tiny = load_tiny("paligemma", tmp_path / "again")
    prompt = ChatPrompts(tiny.processor).render(ask(0, 0, 1).messages, add_generation_prompt=True)
    assert prompt == "<image><image>What is it?"
