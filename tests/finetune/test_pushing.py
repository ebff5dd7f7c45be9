"""A finished run on the hub: what was pushed loads with plain PEFT and transformers, and says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers.hub import TOKEN, USER, Hub, logged_in, output_of, stand_in
from helpers.paths import ROOT
from vlmray.config import FinetuneConfig
from vlmray.finetune.job import run_finetune
from vlmray.finetune.plan import plan_finetune
from vlmray.publishing.hub import PushError

ADAPTER, MERGED = f"models/{USER}/mine", f"models/{USER}/mine-merged"

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer

ids = AutoTokenizer.from_pretrained("jane/mine")("How many bars are there?", return_tensors="pt")
base, other = (AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="float32") for _ in range(2))
with torch.inference_mode():
    before = other(**ids).logits
    adapted = PeftModel.from_pretrained(base, "jane/mine")(**ids).logits
    merged = AutoModelForImageTextToText.from_pretrained("jane/mine-merged", dtype="float32")(**ids).logits
print((adapted - before).abs().max().item(), (adapted - merged).abs().max().item())
"""


@pytest.fixture(scope="module")
def pushed(
    two_cpus: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hub, Path]]:
    """A run whose first attempt to push fails, and the same command with --resume."""
    folder = tmp_path_factory.mktemp("pushed")
    options = {
        "model_id": str(tiny_model), "output_dir": str(folder), "num_workers": "1", "max_steps": 3,
        "dataset_name": "charts?num_rows=64&questions_per_image=2&family=comparison", "learning_rate": 5e-3,
        "per_device_train_batch_size": 2, "eval_split": "test", "eval_slices": "[:8]", "max_new_tokens": 3,
        "merge_adapter": True, "push_to_hub": "mine", "prompt_template": "{question}\nBriefly.",
    }  # fmt: skip
    with stand_in() as hub, pytest.MonkeyPatch.context() as monkeypatch, logged_in(hub, monkeypatch):
        hub.broken = "commit"
        with pytest.raises(PushError, match=r"/jane/mine did not take the result \(HTTP 500"):
            run_finetune(plan_finetune(FinetuneConfig(**options)))
        weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        assert (folder / "run.json").exists()
        hub.broken = ""
        run_finetune(plan_finetune(FinetuneConfig(**options, resume=True)))
        assert hub.repos[ADAPTER]["adapter_model.safetensors"] == weights
        yield hub, tiny_model


def head(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_it_loads_with_plain_peft_and_transformers(pushed: tuple[Hub, Path], tmp_path: Path) -> None:
    hub, base = pushed
    changed, apart = map(float, output_of(hub, LOAD, tmp_path, base).split())
    assert changed > 1e-3
    assert apart < 1e-4


def test_only_safetensors(pushed: tuple[Hub, Path]) -> None:
    hub, _ = pushed
    assert {"adapter_model.safetensors", "adapter_config.json", "training.json"} < {*hub.repos[ADAPTER]}
    assert {"model.safetensors", "config.json"} < {*hub.repos[MERGED]}
    assert hub.by_lfs == {"adapter_model.safetensors", "model.safetensors"}


@pytest.mark.parametrize("repo", [ADAPTER, MERGED])
def test_the_card_says_it_all(pushed: tuple[Hub, Path], repo: str) -> None:
    card = pushed[0].text(repo, "README.md")
    titles = re.findall(r"^## (.+)$", card, re.MULTILINE)
    assert titles == [
        "Use", "Scores", "Data", "Prompt", "Training", "Checks", "Versions", "Command"
    ]  # fmt: skip
    facts = dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", card, re.MULTILINE))
    assert all(facts.values())
    assert not {"None", "n/a", "–", "nan", "False"} & {*facts.values()}
    assert re.fullmatch(
        r"\d[\d.]* % \(95 % interval \d[\d.]* % to \d[\d.]* %; 8 samples, [4-8] images\)",
        facts["exact_match after it"],
    )
    assert facts["exact_match before training"]
    assert facts["question"] == "`'{question}\\nBriefly.'`"
    assert facts["samples trained on"] == "6"
    assert facts["loads afresh"].startswith("passed")
    assert "vlmray finetune" in card
    assert "--max_steps 3" in card
    found = head(card)
    assert found["library_name"] == ("peft" if repo == ADAPTER else "transformers")
    assert found["model-index"][0]["results"][0]["metrics"][0]["type"] == "exact_match"
    assert all(value not in (None, "", []) for value in found.values())


def test_it_tells_nothing_of_this_machine(pushed: tuple[Hub, Path]) -> None:
    hub, base = pushed
    for repo, files in hub.repos.items():
        for name, data in files.items():
            if name.endswith((".json", ".md", ".jinja")):
                text = data.decode()
                for private in (str(base.parent), str(Path.home()), str(ROOT), TOKEN, "/tmp"):
                    assert private not in text, f"{repo}/{name}"
    config = json.loads(hub.text(ADAPTER, "adapter_config.json"))
    assert config["base_model_name_or_path"] == base.name
