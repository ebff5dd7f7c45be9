"""Pushing to the hub: what is refused before a run starts, and what becomes of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCardData

from helpers.hub import USER, Hub, logged_in, stand_in
from vlmray.config import FinetuneConfig
from vlmray.errors import OptionError
from vlmray.publishing.cards import write_card
from vlmray.publishing.hub import HubRepo, PushError, license_of


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in() as found, logged_in(found, monkeypatch):
        yield found


def claim(name: str = "mine", **options: bool) -> HubRepo:
    return HubRepo.claim(name, "model", private=None, **options)


def refused(name: str) -> str:
    with pytest.raises(OptionError) as found:
        claim(name)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_repository_is_made_once(hub: Hub) -> None:
    assert claim("mine") == claim(f"{USER}/mine") == HubRepo(f"{USER}/mine", "model")
    assert [*hub.repos] == [f"models/{USER}/mine"]


@pytest.mark.parametrize("private", [True, False])
def test_it_is_private_where_that_is_wanted(hub: Hub, private: bool) -> None:
    config = FinetuneConfig(push_to_hub="mine", hub_private_repo=private)
    assert HubRepo.of(config, "model", "-merged")
    assert hub.private == {f"models/{USER}/mine-merged": private}


def test_a_dry_run_makes_none(hub: Hub) -> None:
    assert claim(dry_run=True) == HubRepo(f"{USER}/mine", "model")
    assert not hub.repos


def test_no_such_name(hub: Hub) -> None:
    assert "'a b' cannot be the name of a repository; expected NAME or OWNER/NAME" in refused("a b")
    assert not hub.repos


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert refused("mine") == "--push_to_hub mine needs a token; set HF_TOKEN, or log in with: hf auth login"


def test_a_token_that_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "mine may not be written to (HTTP 401); log in" in refused("mine")


def test_a_repository_of_others(hub: Hub) -> None:
    line = refused("other/mine")
    assert "--push_to_hub other/mine may not be written to (HTTP 403: You don't have the rights" in line
    assert "pass a repository of yours" in line


def test_a_repository_of_others_that_is_there(hub: Hub) -> None:
    hub.repos["models/other/mine"] = {}
    hub.broken = "auth-check"
    assert "may not be written to (HTTP 500" in refused("other/mine")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "may not be written to (ConnectError" in refused("mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused("mine") == "--push_to_hub mine needs the hub, and HF_HUB_OFFLINE is set; unset it"


def test_files_arrive_as_they_are(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 100)
    card = write_card(ModelCardData(license="mit"), "Title", "Lead", {})
    claim().push({"a.safetensors": tmp_path / "weights", "README.md": card.encode()}, "First")
    assert hub.repos[f"models/{USER}/mine"] == {
        "a.safetensors": bytes(range(256)) * 100,
        "README.md": card.encode(),
    }
    assert hub.by_lfs == {"a.safetensors"}
    assert license_of(f"{USER}/mine", "model") == "mit"


def test_nothing_that_runs_code_is_pushed(hub: Hub) -> None:
    with pytest.raises(PushError, match=r"training_args\.bin could run code when it is loaded"):
        claim().push({"training_args.bin": b"1"}, "First")


@pytest.mark.parametrize("broken", ["preupload", "commit", "lfs"])
def test_a_hub_that_fails(hub: Hub, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, hub.broken = claim(), broken
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its attempts
    with pytest.raises(PushError, match="did not take the result") as found:
        repo.push({"a.safetensors": b"1"}, "First")
    assert "\n" not in str(found.value)
    assert hub.repos[f"models/{USER}/mine"] == {}


def test_an_unknown_licence(hub: Hub) -> None:
    assert license_of("jane/nothing", "dataset") is None
