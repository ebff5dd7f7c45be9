"""Which adapters a server offers, and where their files come from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vlmray.serving.adapters import AdapterCatalog


def test_names_are_those_given_and_those_of_the_folder(
    tmp_path: Path, tiny_model: Path, tiny_adapter: Path
) -> None:
    for name in ("later", "first", ".hidden"):
        shutil.copytree(tiny_adapter, tmp_path / name)
    (tmp_path / "no-adapter").mkdir()
    (tmp_path / "file").touch()
    catalog = AdapterCatalog(str(tiny_model), {"first": str(tiny_adapter)}, str(tmp_path))
    assert catalog.names() == ["first", "later"]
    assert catalog.fetch("first") == tiny_adapter  # given by name wins
    assert catalog.fetch("later") == tmp_path / "later"
    catalog.check()


@pytest.mark.parametrize("name", ["gone", "", ".", "..", "../first", "/etc", ".hidden", "a/b"])
def test_names_are_no_paths(tmp_path: Path, tiny_model: Path, tiny_adapter: Path, name: str) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "first")
    shutil.copytree(tiny_adapter, tmp_path / "folder" / ".hidden")
    with pytest.raises(FileNotFoundError):
        AdapterCatalog(str(tiny_model), {}, str(tmp_path / "folder")).fetch(name)
    with pytest.raises(FileNotFoundError, match="no adapter named"):
        AdapterCatalog(str(tiny_model), {}).fetch(name)


def test_an_adapter_behind_a_uri_is_copied_once_for_each_version(
    tmp_path: Path, tiny_model: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMRAY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_adapter, tmp_path / "far" / "first")
    (tmp_path / "far" / "first" / "other.bin").write_bytes(b"pickle")
    catalog = AdapterCatalog(str(tiny_model), {}, f"file://{tmp_path}/far")
    assert catalog.names() == ["first"]
    copy = catalog.fetch("first")
    assert copy.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in copy.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert catalog.fetch("first") == copy
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    weights = tmp_path / "far" / "first" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data)  # a new version
    assert catalog.fetch("first") != copy


def test_what_cannot_be_served_is_said(tmp_path: Path, tiny_model: Path, tiny_adapter: Path) -> None:
    (tmp_path / "empty").mkdir()
    catalog = AdapterCatalog(str(tiny_model), {"empty": str(tmp_path / "empty")})
    for ask in (catalog.check, lambda: catalog.fetch("empty")):
        with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
            ask()
    with pytest.raises(FileNotFoundError, match=r"--adapter_dir .*gone"):
        AdapterCatalog(str(tiny_model), {}, str(tmp_path / "gone")).check()
    missing = AdapterCatalog(str(tiny_model), {"far": f"file://{tmp_path}/gone"})
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        missing.fetch("far")
