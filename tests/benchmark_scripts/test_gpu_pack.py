"""Packing for a GPU machine without a network: what is carried, what is stripped, how it is unpacked."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.gpu import install as installer
from benchmarks.gpu.closure import Package, describe_target, find_closure, read_present
from benchmarks.gpu.install import install
from benchmarks.gpu.pack import ROOT
from benchmarks.gpu.wheels import archive_site, find_wheel, is_kept, read_wheel

PYTHON = "{}.{}".format(*sys.version_info)
FAKE = {
    "app": Package("1.0", ["web[fast]", "arrays>=1", "old; python_version < '3.12'", "win; os_name == 'nt'"]),
    "web": Package("2.1", ["arrays>=3", "loop; extra == 'fast'", "docs; extra == 'docs'"]),
    "arrays": Package("3.0", ["blas"]),
    "loop": Package("4.0", []),
    "old": Package("5.0", []),
    "blas": Package("6.0", []),
}


def describe_fake(name: str) -> Package:
    if name not in FAKE:
        raise metadata.PackageNotFoundError(name)
    return FAKE[name]


def carried(python: str, present: dict[str, str | None], root: str = "App") -> list[str]:
    closure = find_closure(
        [root], present=present, environment=describe_target(python), describe=describe_fake
    )
    return sorted(closure.carried)


def test_closure_follows_extras_and_the_targets_markers() -> None:
    assert carried("3.12", {}) == ["app", "arrays", "blas", "loop", "web"]
    assert carried("3.11", {}) == ["app", "arrays", "blas", "loop", "old", "web"]


def test_a_present_package_is_carried_only_if_known_to_be_too_old() -> None:
    assert carried("3.12", {"arrays": None}) == ["app", "loop", "web"]
    assert carried("3.12", {"arrays": "3.5"}) == ["app", "loop", "web"]
    assert carried("3.12", {"arrays": "2.0"}) == ["app", "arrays", "blas", "loop", "web"]


def test_extras_of_a_present_package_are_followed_without_its_own_needs() -> None:
    assert carried("3.12", {"web": None}, root="web[fast]") == ["loop"]


def test_a_need_that_is_not_installed_ends_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^the project needs gone, which this environment lacks; next: "):
        find_closure(["gone"], present={}, environment=describe_target("3.12"), describe=describe_fake)


def test_closure_of_ray_beside_a_pytorch_image() -> None:
    present = read_present((ROOT / "benchmarks/gpu/present.txt").read_text(encoding="utf-8"))
    closure = find_closure(
        ["ray[data,serve]>=2", "trl"], present=present, environment=describe_target("3.12")
    )
    assert closure.carried["ray"] == metadata.version("ray")
    assert {"uvicorn", "fastapi", "pydantic-core", "opentelemetry-sdk", "datasets"} <= closure.carried.keys()
    assert not {"torch", "numpy", "pyarrow", "protobuf", "transformers"} & closure.carried.keys()
    assert {"numpy", "pyarrow", "protobuf", "transformers"} <= closure.expected.keys()


def test_present_list_reads_names_versions_and_comments() -> None:
    assert read_present("# an image\nHugging_Face.Hub==1.0\n\ntorch  # cu130\n") == {
        "hugging-face-hub": "1.0",
        "torch": None,
    }


@pytest.mark.parametrize(
    "path",
    [
        "ray/rllib/__init__.py",
        "ray/jars/ray_dist.jar",
        "ray/serve/tests/test_api.py",
        "ray/dashboard/client/build/static/js/main.js",
        "bitsandbytes/libbitsandbytes_cuda128.so",
        "bitsandbytes/libbitsandbytes_cuda13.so",
        "bitsandbytes/libbitsandbytes_rocm70.so",
        "fast/_speed.pyx",
        "fast/__pycache__/a.cpython-312.pyc",
    ],
)
def test_stripped(path: str) -> None:
    assert not is_kept(path, "130")


@pytest.mark.parametrize(
    "path",
    [
        "ray/_raylet.so",
        "ray/data/__init__.py",
        "ray/dashboard/client/build/index.html",
        "ray/dashboard/client/build/static/css/main.css",
        "ray-2.60.0.dist-info/METADATA",
        "bitsandbytes/libbitsandbytes_cuda130.so",
        "bitsandbytes/libbitsandbytes_cpu.so",
        "tests.py",
    ],
)
def test_kept(path: str) -> None:
    assert is_kept(path, "130")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with code, a program, a script, a test and a header."""
    path = tmp_path / "fake_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake_pkg/__init__.py", "NAME = 'fake'\n")
        program = zipfile.ZipInfo("fake_pkg/program")
        program.external_attr = 0o100755 << 16
        archive.writestr(program, "#!/bin/sh\n")
        archive.writestr("fake_pkg/tests/test_it.py", "")
        archive.writestr("fake_pkg-1.0.data/scripts/run", "")
        archive.writestr("fake_pkg-1.0.data/purelib/extra.py", "")
        archive.writestr("fake_pkg-1.0.data/headers/extra.txt", "")
        archive.writestr("fake_pkg-1.0.dist-info/METADATA", "Name: fake-pkg\nVersion: 1.0\n")
    return path


@pytest.fixture
def pack(wheel: Path, tmp_path: Path) -> Path:
    """A pack of the fake wheel for the running Python."""
    return make_pack(tmp_path / "pack", archive_site([wheel], "130", tmp_path).read_bytes())


def make_pack(folder: Path, archive: bytes) -> Path:
    folder.mkdir()
    (folder / "site.tar.xz").write_bytes(archive)
    manifest = {
        "python": PYTHON,
        "platform": sysconfig.get_platform(),
        "sha256": hashlib.sha256(archive).hexdigest(),
        "expected": {"numpy": ">=1", "packaging": ">=999", "no-such-package": ""},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_wheel_paths_are_those_of_site_packages(wheel: Path) -> None:
    assert find_wheel("fake-pkg", "1.0", wheel.parent) == wheel
    assert find_wheel("fake-pkg", "1.1", wheel.parent) is None
    assert sorted(read_wheel(wheel, "130")) == [
        "bin/run",
        "extra.py",
        "fake_pkg-1.0.dist-info/METADATA",
        "fake_pkg/__init__.py",
        "fake_pkg/program",
    ]


def test_install_unpacks_once_and_says_what_the_machine_lacks(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = install(pack, tmp_path / "to")
    warnings = capsys.readouterr().err
    assert "warning: packaging is " in warnings
    assert "warning: no no-such-package here" in warnings
    assert "numpy" not in warnings
    assert (site / "fake_pkg/program").stat().st_mode & 0o111
    assert not (site / "fake_pkg/__init__.py").stat().st_mode & 0o111
    assert list((tmp_path / "to").iterdir()) == [site]

    (site / "mark").touch()
    assert install(pack, tmp_path / "to") == site
    assert (site / "mark").exists()
    assert capsys.readouterr().err == ""


def test_installed_packages_are_found_through_the_printed_path(pack: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.install", "--print-path"]
    command += [f"--pack={pack}", f"--to={tmp_path / 'to'}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    code = (
        "import fake_pkg; from importlib import metadata; print(fake_pkg.NAME, metadata.version('fake-pkg'))"
    )
    env = {"PYTHONPATH": printed}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fake", "1.0"]


def test_install_refuses_a_damaged_archive(pack: Path, tmp_path: Path) -> None:
    with (pack / "site.tar.xz").open("ab") as archive:
        archive.write(b"x")
    with pytest.raises(SystemExit, match=r"has sha256 \w+, the manifest \w+; carry the pack again$"):
        install(pack, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_install_refuses_another_python(pack: Path, tmp_path: Path) -> None:
    manifest = json.loads((pack / "manifest.json").read_text(encoding="utf-8"))
    (pack / "manifest.json").write_text(json.dumps({**manifest, "python": "2.7"}), encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"is for python 2\.7, not {PYTHON}; pack again with"):
        install(pack, tmp_path / "to")


def test_install_without_a_pack_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no pack in .*: python -m benchmarks.gpu.pack$"):
        install(tmp_path / "nothing", tmp_path / "to")


@pytest.mark.parametrize("name", ["../outside", "/tmp/vlmray-outside"])
def test_install_never_writes_outside_its_folder(name: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    pack = make_pack(tmp_path / "pack", stream.getvalue())
    if name.startswith("/"):  # made relative, as tar does
        assert (install(pack, tmp_path / "to") / name[1:]).exists()
    else:
        with pytest.raises(SystemExit, match="would write outside its folder"):
            install(pack, tmp_path / "to")
        assert list((tmp_path / "to").iterdir()) == []
    assert not Path(name).exists()
    assert not (tmp_path / "outside").exists()


def test_an_interrupted_install_leaves_nothing(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(tar: tarfile.TarFile, path: Path, **_: object) -> None:
        tar.extract(tar.getnames()[0], path, filter="data")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(installer.tarfile.TarFile, "extractall", interrupt)
        with pytest.raises(KeyboardInterrupt):
            install(pack, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    assert (install(pack, tmp_path / "to") / "fake_pkg").is_dir()
