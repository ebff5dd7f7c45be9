"""What the package uses of other libraries that they do not offer: why, and when it can go.

The table is the one place that says so. A test fails with the row's own words once the library has changed
it, where the package would only be slower or say less. Another finds uses that have no row: by their leading
underscore, so names that are merely undocumented need a reader who knows.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import logging
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Private:
    """A row of the table."""

    module: str
    """Where it is used, below `vlmray`."""

    name: str
    library: str
    """Whose it is, with a version in which it is what is used here."""

    why: str
    upstream: str
    """The issue that is about it."""

    until: str
    """When it can go."""

    holds: Callable[[], object]
    """Whether it still is what is used here."""

    def __str__(self) -> str:
        return (
            f"{self.name} of {self.library}, used in vlmray/{self.module.replace('.', '/')}.py, is not what "
            f"it was.\n  used because: {self.why}\n  upstream: {self.upstream}\n  can go: {self.until}"
        )


def takes(function: Callable[..., Any], *names: str) -> bool:
    """Whether a function takes just these arguments."""
    return tuple(inspect.signature(function).parameters) == names


def _ray_address() -> object:
    from ray._private.utils import read_ray_address

    return takes(read_ray_address, "temp_dir") and read_ray_address("/no/such/folder") is None


def _actors() -> object:
    from ray._private import state

    return takes(state.actors, "actor_id", "job_id", "actor_state_name")


def _gcs_client() -> object:
    from ray._raylet import GcsClient

    with pytest.raises(TypeError, match=r"takes at least 1 positional argument"):  # says where it asks
        GcsClient(nothing="")
    return isinstance(GcsClient, type)


def _token_if_available() -> object:
    from ray._private.authentication import authentication_token_setup

    return takes(authentication_token_setup.maybe_enable_token_auth_if_token_available, "warn_if_disabled")


def _ray_data_console() -> object:
    importlib.import_module("ray.data")  # sets up its logger
    return "console" in [handler.name for handler in logging.getLogger("ray.data").handlers]


def _available_per_node() -> object:
    from ray._private import state

    return takes(state.available_resources_per_node) and "node hex id" in (
        state.available_resources_per_node.__doc__ or ""
    )


def _jobs() -> object:
    from ray._private import state

    return takes(state.jobs) and '["IsDead"] = ' in inspect.getsource(state.state.job_table)


def _bootstrap_config() -> object:
    from ray.autoscaler._private import command_runner

    return "~/ray_bootstrap_config.yaml" in inspect.getsource(command_runner)


def _health_check_failure() -> object:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    cause = ValueError("died")
    return WorkerHealthCheckFailedError("no answer", cause).health_check_failure is cause


def _dataset_fingerprint() -> object:
    from datasets import Dataset

    one, same, other = (Dataset.from_dict({"a": [value]})._fingerprint for value in (1, 1, 2))
    return isinstance(one, str) and one == same != other


def _attention_of_a_tower() -> object:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig().vision_config
    config._attn_implementation = "sdpa"
    return config._attn_implementation == "sdpa" and "_attn_implementation" in dir(type(config))


def _flash_by_name() -> object:
    from transformers.utils.generic import is_flash_attention_requested

    from vlmray.engines.transformers.attention import _NAME

    return is_flash_attention_requested(requested_attention_implementation=_NAME)


def _linear_pointwise() -> object:
    import torch

    schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    return re.findall(r"(\w+)(?:,|\))", schema.split("->")[0]) == [
        "X", "W", "B", "attr", "scalars", "algorithm"
    ]  # fmt: skip


def _hook_of_accelerate() -> object:
    import torch
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = torch.nn.Linear(1, 1)
    before = hasattr(module, "_hf_hook")
    add_hook_to_module(module, ModelHook())
    return hasattr(module, "_hf_hook") and not before


def _attributes_of_a_processor() -> object:
    from transformers import Qwen2_5_VLProcessor

    attributes = Qwen2_5_VLProcessor.get_attributes
    return takes(attributes) and {"tokenizer", "image_processor", "video_processor"} <= set(attributes())


def _prepare_inputs() -> object:
    from transformers import Trainer

    return takes(Trainer._prepare_inputs, "self", "inputs")


def _load_from_checkpoint() -> object:
    from transformers import Trainer

    return takes(Trainer._load_from_checkpoint, "self", "resume_from_checkpoint", "model")


def _use_triton() -> object:
    import trl.trainer.utils

    used = inspect.getsource(trl.trainer.utils).count("_use_triton(")
    return takes(trl.trainer.utils._use_triton, "device") and used == 1  # to score labels alone


NOT_FOUND = "none found"

TABLE = [
    Private(
        module="cluster.connection", name="read_ray_address", library="ray 2.60.0",
        why="`ray.init` waits minutes for a cluster that was killed; its address has to be tried before",
        upstream="ray-project/ray#28008", until="`ray.init` gives up soon, or tells its address",
        holds=_ray_address,
    ),
    Private(
        module="cluster.connection", name="GcsClient", library="ray 2.60.0",
        why="tells at once that a cluster wants another token; `ray.init` tries for 20 seconds to reach it",
        upstream=NOT_FOUND, until="`ray.init` raises AuthenticationError", holds=_gcs_client,
    ),
    Private(
        module="cluster.connection", name="maybe_enable_token_auth_if_token_available", library="ray 2.60.0",
        why="takes this machine's token for an address that is given; `ray.init` does so for `auto` alone",
        upstream=NOT_FOUND, until="`ray.init` does so for every address", holds=_token_if_available,
    ),
    Private(
        module="cluster.connection", name="console", library="ray 2.60.0",
        why="the console handler of `ray.data` is silenced: its warnings would break up the progress bar",
        upstream="ray-project/ray#41279", until="Ray Data has an option for it", holds=_ray_data_console,
    ),
    Private(
        module="cluster.resources", name="ray_bootstrap_config.yaml", library="ray 2.60.0",
        why="what a cluster of `ray up` could still start stands only in this file of its head node",
        upstream=NOT_FOUND, until="Ray answers what its autoscaler may start", holds=_bootstrap_config,
    ),
    Private(
        module="serving.presence", name="available_resources_per_node", library="ray 2.60.0",
        why="tells which nodes work: gateways stand there, and do not hold others",
        upstream=NOT_FOUND, until="a deployment of Serve can stand on the nodes of another",
        holds=_available_per_node,
    ),
    Private(
        module="serving.presence", name="jobs", library="ray 2.60.0",
        why="tells that a driver was killed; what it had Serve start would stay for ever",
        upstream=NOT_FOUND, until="Serve ends with its driver, or Ray tells of jobs without a dashboard",
        holds=_jobs,
    ),
    Private(
        module="cluster.waiting", name="state", library="ray 2.60.0",
        why="tells which actors have no place yet; the public list of actors needs a dashboard",
        upstream=NOT_FOUND, until="`ray.util.state` answers without a dashboard", holds=_actors,
    ),
    Private(
        module="finetune.progress", name="health_check_failure", library="ray 2.60.0",
        why="tells the worker that died from those that lost their connection with it",
        upstream="ray-project/ray#49819", until="`UserCallback.after_exception` says which worker died",
        holds=_health_check_failure,
    ),
    Private(
        module="dataset.huggingface", name="_fingerprint", library="datasets 5.2.0",
        why="what resumed runs compare where a dataset has neither files here nor a commit",
        upstream=NOT_FOUND, until="`Dataset` has a public fingerprint", holds=_dataset_fingerprint,
    ),
    Private(
        module="engines.transformers.attention", name="_attn_implementation", library="transformers 5.19.0",
        why="says which attention a loaded vision tower uses, and has it use another",
        upstream=NOT_FOUND, until="configs have a public getter beside `attn_implementation=`",
        holds=_attention_of_a_tower,
    ),
    Private(
        module="engines.transformers.attention", name="packed_sdpa_as_flash", library="transformers 5.19.0",
        why="sequences come packed to attention functions with a flash in their name, one by one to others",
        upstream="huggingface/transformers#37363", until="attention functions say what they take",
        holds=_flash_by_name,
    ),
    Private(
        module="engines.transformers.linear", name="_linear_pointwise", library="torch 2.13.0",
        why="products by oneDNN take half the time of MKL's on processors of AMD",
        upstream=NOT_FOUND, until="torch chooses by processor, or lets choose", holds=_linear_pointwise,
    ),
    Private(
        module="models.families.patch_embedding", name="_hf_hook", library="accelerate 1.15.0",
        why="a module whose weights are moved when it is called must be called as it is",
        upstream=NOT_FOUND, until="accelerate tells whether a module has a hook", holds=_hook_of_accelerate,
    ),
    Private(
        module="models.processors", name="get_attributes", library="transformers 5.19.0",
        why="without torchvision a processor loads only if its video part is not among its attributes",
        upstream="huggingface/transformers#48558", until="`AutoProcessor` loads without the video part",
        holds=_attributes_of_a_processor,
    ),
    Private(
        module="training.trainer", name="_prepare_inputs", library="transformers 5.19.0",
        why="the only step between a batch on the device and the forward pass, in training and evaluation",
        upstream=NOT_FOUND, until="`Trainer` has a public one", holds=_prepare_inputs,
    ),
    Private(
        module="training.trainer", name="_load_from_checkpoint", library="transformers 5.19.0",
        why="a resumed full fine-tuning would begin with the base's weights: names are not converted",
        upstream="huggingface/transformers#43701", until="that is closed", holds=_load_from_checkpoint,
    ),
    Private(
        module="training.trainer", name="_use_triton", library="trl 1.16.0",
        why="on a CPU the head would score every token of the prompt and image too, and training be slower",
        upstream="huggingface/trl#7244", until="TRL scores only labels everywhere but under compilers",
        holds=_use_triton,
    ),
    Private(
        module="config.parsing", name="_format_action_invocation", library="Python 3.11",
        why="help shows each option once, not with its hyphenated spelling too",
        upstream=NOT_FOUND, until="argparse can hide a spelling",
        holds=lambda: takes(argparse.HelpFormatter._format_action_invocation, "self", "action"),
    ),
    Private(
        module="config.parsing", name="_format_args", library="Python 3.11",
        why="the same",
        upstream=NOT_FOUND, until="the same",
        holds=lambda: takes(argparse.HelpFormatter._format_args, "self", "action", "default_metavar"),
    ),
]  # fmt: skip

OFFERED = {"_asdict", "_exit", "_info", "_compute"}
"""Underscores that are documented: of named tuples, `os`, and metrics of `evaluate`."""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.module}-{row.name}")
def test_it_is_what_it_was(row: Private) -> None:
    try:
        holds = row.holds()
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        pytest.fail(f"{row}\n  {type(error).__name__}: {error}")
    assert holds, str(row)


def _is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


def _uses(tree: ast.AST) -> Iterator[str]:
    """Names of others that a module imports, reads or sets by name."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=aliases) if not module.startswith("vlmray"):
                hidden = any(map(_is_private, module.split(".")))
                yield from (alias.name for alias in aliases if hidden or _is_private(alias.name))
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases if any(map(_is_private, alias.name.split("."))))
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue  # in question only in a class that inherits: see below
            case ast.Attribute(attr=name) if _is_private(name):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=name), *_],
            ) if _is_private(name):
                yield name


def _inherited(module: Any) -> Iterator[str]:
    """Names of foreign bases that a module's classes override, or use of themselves."""
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__ == module.__name__:
            bases = [
                base for base in cls.__mro__ if base.__module__.split(".")[0] not in ("vlmray", "typing")
            ]
            theirs = {name for base in bases for name in vars(base) if _is_private(name)} - {"_abc_impl"}
            body = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
            used = {node.attr for node in body if isinstance(node, ast.Attribute)}
            yield from theirs & (used | vars(cls).keys())


def _found() -> set[tuple[str, str]]:
    found = set()
    for path in sorted((ROOT / "vlmray").rglob("*.py")):
        parts = path.relative_to(ROOT / "vlmray").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        module = importlib.import_module(f"vlmray.{name}" if name else "vlmray")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        used = {*_uses(tree)} - own | {*_inherited(module)}
        found |= {(name, use) for use in used - OFFERED}
    return found


def test_every_use_is_in_the_table() -> None:
    named = {(row.module, row.name) for row in TABLE}
    found = _found()
    assert not found - named, "\n".join(
        f"vlmray/{module.replace('.', '/')}.py uses {use}: give it a row in TABLE, or do without"
        for module, use in sorted(found - named)
    )
    stale = {row for row in named - found if row[1] not in _source_of(row[0])}
    assert not stale, f"nothing uses them, so their rows in TABLE can go: {sorted(stale)}"
    assert len(named) == len(TABLE)


def _source_of(module: str) -> str:
    return (ROOT / "vlmray" / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from ray._private.utils import read_ray_address", ["read_ray_address"]),
        ("from trl.trainer.utils import _use_triton", ["_use_triton"]),
        ("import ray._private.state", ["ray._private.state"]),
        ("trl.trainer.utils._use_triton = None", ["_use_triton"]),
        ("super()._save_checkpoint()", ["_save_checkpoint"]),
        ("self.model._modules", ["_modules"]),
        ("getattr(module, '_hf_hook', None)", ["_hf_hook"]),
        ("from vlmray._lazy import offer; self._mine = [thing.__class__ for _ in things]", []),
    ],
)
def test_uses_are_seen(code: str, names: list[str]) -> None:
    assert list(_uses(ast.parse(code))) == names
