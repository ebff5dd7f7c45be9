"""One conversation in every form that tools write trains the same tokens, those of TRL's own collator."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.collating import random_image
from helpers.finetuning import curve, make_config, read_features, train
from vlmray.config import FinetuneConfig
from vlmray.finetune.plan import open_training_data
from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.samples import first_question

NUM_SAMPLES = 40
NAMES = {"user": "human", "assistant": "gpt"}
FORMS = ("LLaVA", "ShareGPT", "TRL", "OpenAI")

Turns = list[tuple[str, str]]


def _conversation(rng: random.Random, number: int) -> tuple[Turns, int]:
    """Return three questions and answers, about two images but every fifth time about none."""
    images = 0 if number % 5 == 2 else 2
    marks = ["<image>\n<image>\n", "", ""] if number % 2 else ["<image>\n", "As in <image>: ", ""]
    turns: Turns = []
    for turn, mark in enumerate(marks):
        turns.append(("user", f"{mark if images else ''}How many in part {turn} of {rng.randint(0, 99)}?"))
        turns.append(("assistant", f"{rng.randint(0, 99)} é {number}"))
    return turns, images


def _parts(text: str, places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cut a text at its marks; `places` are those of the images that are still to come."""
    first, *others = text.split("<image>")
    parts = [{"type": "text", "text": first}]
    for piece in others:
        parts += [places.pop(0), {"type": "text", "text": piece.removeprefix("\n")}]
    return [part for part in parts if part.get("text") != ""]


def _row(form: str, turns: Turns, images: list[str]) -> dict[str, Any]:
    if form in ("LLaVA", "ShareGPT"):
        said = [{"from": NAMES[role], "value": text} for role, text in turns]
        return {"id": "0", ("image" if form == "LLaVA" else "images"): images, "conversations": said}
    urls = [{"type": "image_url", "image_url": {"url": name}} for name in images]
    places = urls if form == "OpenAI" else [{"type": "image"} for _ in images]
    messages: list[dict[str, Any]] = [{"role": role, "content": _parts(text, places)} for role, text in turns]
    if form == "OpenAI":
        messages[1::2] = [{"role": role, "content": text} for role, text in turns[1::2]]
    return {"messages": messages, **({} if form == "OpenAI" else {"images": images})}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of each form in a folder with the images."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(3)
    written: dict[str, list[str]] = {form: [] for form in FORMS}
    for number in range(NUM_SAMPLES):
        turns, num_images = _conversation(rng, number)
        names = [f"{number}-{place}.png" for place in range(num_images)]
        for name in names:
            random_image(rng).resize((60, 90)).save(folder / name)
        for form in FORMS:
            written[form].append(json.dumps(_row(form, turns, names)))
    for form, lines in written.items():
        (folder / f"{form}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _features(rows: Path, form: str) -> list[dict[str, Any]]:
    config = FinetuneConfig(dataset_name=str(rows / f"{form}.jsonl"), model_id="tiny-random")
    return read_features(open_training_data(config).train)


def _encode(rows: Path, form: str, processor: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    collator = DataCollatorForVLMSFT(processor, **options)
    return [collator.encode(feature["messages"], feature["images"]) for feature in _features(rows, form)]


def test_all_forms_train_the_same_tokens_and_those_of_trl(rows: Path, processor: Any) -> None:
    found = {form: _encode(rows, form, processor) for form in FORMS}
    trl = DataCollatorForVisionLanguageModeling(processor)
    lines = (rows / "TRL.jsonl").read_text().splitlines()
    for number, (line, one) in enumerate(zip(lines, found["TRL"], strict=True)):
        row = json.loads(line)
        for form in FORMS:
            other = found[form][number]
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one), form
        images = [Image.open(rows / name).convert("RGB") for name in row["images"]]
        batch = trl([{"messages": row["messages"], "images": images}])
        length = one["input_ids"].shape[1]
        assert torch.equal(one["input_ids"], batch["input_ids"][:, :length])
        assert processor.tokenizer.decode(batch["input_ids"][0, length:]).strip() == ""
        assert ("pixel_values" in one) == bool(images)
        if images:
            assert torch.equal(one["pixel_values"], batch["pixel_values"])
        check_labels(one, row, processor)


def check_labels(one: dict[str, torch.Tensor], row: dict[str, Any], processor: Any) -> None:
    """Every answer is supervised with its end token, and nothing else."""
    ids, labels = one["input_ids"][0], one["labels"][0]
    answers = [message["content"][0]["text"] for message in row["messages"][1::2]]
    supervised = processor.tokenizer.decode(ids[labels != -100])
    assert supervised == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_the_last_answer_alone_has_the_labels_of_trls_completion(rows: Path, processor: Any) -> None:
    last = _encode(rows, "OpenAI", processor, train_on="last")
    trl = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    for line, one in zip((rows / "TRL.jsonl").read_text().splitlines(), last, strict=True):
        row = json.loads(line)
        images = [Image.open(rows / name).convert("RGB") for name in row["images"]]
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
        batch = trl([{"prompt": prompt, "completion": completion, "images": images}])
        length = one["input_ids"].shape[1]
        assert torch.equal(one["input_ids"], batch["input_ids"][:, :length])
        assert torch.equal(one["labels"], batch["labels"][:, :length])


def test_the_last_question_is_what_the_answers_are_to(rows: Path) -> None:
    for feature in _features(rows, "LLaVA"):
        request = first_question(feature, 5)
        assert request.messages == feature["messages"][:-1]
        assert feature["answers"] == [feature["messages"][-1]["content"][0]["text"]]
        assert len(request.images) == len(feature["images"])


def test_a_run_over_two_forms_has_the_same_losses(rows: Path, tiny_model: Path) -> None:
    losses = []
    for form in ("LLaVA", "OpenAI"):
        config = make_config(
            tiny_model,
            dataset_name=str(rows / f"{form}.jsonl"),
            max_steps=2,
            eval_slices="[:4]",
            eval_samples=2,
        )
        outcome = train(config, data=open_training_data(config))
        assert not outcome.errors
        assert [row["answers"] for row in outcome.answered] == [
            feature["answers"] for feature in _features(rows, form)[:2]
        ]
        losses.append((curve(outcome), curve(outcome, "eval_loss")))
    assert losses[0] == losses[1]
    assert len(losses[0][0]) == 2


def test_several_questions_of_conversations_are_no_option(rows: Path) -> None:
    config = FinetuneConfig(
        dataset_name=str(rows / "TRL.jsonl"), model_id="tiny-random", max_turns=2
    )  # fmt: skip
    with pytest.raises(ValueError, match="--max_turns is for questions, and 'messages' holds conversations"):
        open_training_data(config)
