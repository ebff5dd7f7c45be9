r"""Pack what a GPU machine without a network lacks: packages, rows of charts, a processor.

    python -m benchmarks.gpu.pack --dataset_name FOLDER_OF_CHARTQA --processor FOLDER_OF_QWEN2_5_VL

Run it in the environment of `make setup`, whose packages say what vlmray needs and at which versions:

    requirements - what the target has -> wheels for its Python -> stripped -> site.tar.xz \
    the first rows of ChartQA's test split -----------------------------------> chartqa/    > .gpu/
    a processor's files, without weights -------------------------------------> processor/ /

Carry `.gpu/` with the repository; there, `python -m benchmarks.gpu.install` unpacks the packages. For Linux
on x86-64 only. Downloads and archives stay in `build/gpu/`, so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet

from benchmarks.gpu.closure import describe_target, find_closure, read_present
from benchmarks.gpu.wheels import MIB, archive_site, fetch_wheel, read_wheel

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "gpu"
PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json",
    "config.json", "generation_config.json",
)  # fmt: skip


def main() -> None:
    """Build the pack, print its sizes and put it in place."""
    options = parse_options()
    output = Path(options.output_dir)
    if output.exists() and not (output / "manifest.json").exists():
        sys.exit(f"{output} exists and is no pack; give --output_dir a new folder")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        scratch = Path(folder) / "pack"
        total = build_pack(options, scratch)
        if total > options.max_mib:
            sys.exit(
                f"the pack has {total:.1f} MiB, over --max_mib {options.max_mib:g}; try a lower --num_rows"
            )
        shutil.rmtree(output, ignore_errors=True)
        shutil.move(scratch, output)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_dir", default=ROOT / ".gpu", help="default: .gpu")
    parser.add_argument("--python_version", default="3.12", help="the target's")
    parser.add_argument("--present", help="what the target has: lines of NAME or NAME==VERSION")
    parser.add_argument("--cuda", default="130", help="the target's: which library of bitsandbytes travels")
    parser.add_argument("--dataset_name", help="a folder of Parquet files in ChartQA's schema")
    parser.add_argument("--num_rows", type=int, default=300, help="of its test split, the first")
    parser.add_argument("--processor", help="a folder with the files of a Qwen2.5-VL")
    parser.add_argument("--max_mib", type=float, default=50)
    return parser.parse_args()


def build_pack(options: argparse.Namespace, target: Path) -> float:
    """Put everything into a new folder and print its sizes; return the total in MiB."""
    target.mkdir()
    if options.dataset_name:
        copy_rows(Path(options.dataset_name), options.num_rows, target / "chartqa" / "data")
    if options.processor:
        copy_processor(Path(options.processor), target / "processor")
    return print_sizes(target, pack_site(options, target))


def copy_rows(source: Path, num_rows: int, target: Path) -> None:
    """Write the first rows of the test split's Parquet files, in their order, as one file."""
    files = sorted(source.rglob("test-*.parquet"))
    if not files:
        sys.exit(f"no test-*.parquet under {source}; --dataset_name takes a folder in ChartQA's layout")
    table = pyarrow.dataset.dataset(files).head(num_rows)
    target.mkdir(parents=True)
    pyarrow.parquet.write_table(table, target / "test-00000-of-00001.parquet", compression="zstd")


def copy_processor(source: Path, target: Path) -> None:
    """Copy a model's files without weights: enough for its processor, or for a small random model."""
    if missing := [name for name in PROCESSOR_FILES if not (source / name).exists()]:
        sys.exit(f"{source} lacks {', '.join(missing)}; --processor takes the folder of a Qwen2.5-VL")
    target.mkdir()
    for name in PROCESSOR_FILES:
        shutil.copyfile(source / name, target / name)


def pack_site(options: argparse.Namespace, target: Path) -> dict[str, int]:
    """Write site.tar.xz and manifest.json; return each package's bytes, unpacked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    present = Path(options.present or Path(__file__).with_name("present.txt")).read_text(encoding="utf-8")
    closure = find_closure(
        project["dependencies"],
        present=read_present(present),
        environment=describe_target(options.python_version),
    )
    folder = CACHE / f"wheels-{options.python_version}"
    wheels = {
        name: fetch_wheel(name, version, options.python_version, folder)
        for name, version in sorted(closure.carried.items())
    }
    archive = archive_site(wheels.values(), options.cuda, CACHE)
    shutil.copyfile(archive, target / "site.tar.xz")
    sizes = {
        name: sum(member.file_size for member in read_wheel(wheel, options.cuda).values())
        for name, wheel in wheels.items()
    }
    manifest = {
        "python": options.python_version,
        "platform": "linux-x86_64",
        "cuda": options.cuda,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "packages": {name: {"version": closure.carried[name], "bytes": sizes[name]} for name in sizes},
        "expected": dict(sorted(closure.expected.items())),
    }
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return sizes


def print_sizes(pack: Path, sizes: dict[str, int]) -> float:
    """Print the largest packages and the parts of the pack, in MiB; return the total."""
    print(f"{len(sizes)} packages, unpacked, MiB:")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:12]:
        print(f"  {name:<32}{size / MIB:>7.1f}")
    print(f"  {'all':<32}{sum(sizes.values()) / MIB:>7.1f}")
    files = {path: path.stat().st_size / MIB for path in sorted(pack.rglob("*")) if path.is_file()}
    print("pack, MiB:")
    for path, size in files.items():
        print(f"  {path.relative_to(pack)!s:<48}{size:>7.1f}")
    print(f"  {'total':<48}{sum(files.values()):>7.1f}")
    return sum(files.values())


if __name__ == "__main__":
    main()
