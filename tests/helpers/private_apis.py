"""What the package uses of other libraries that they do not offer: why, and when it can go.

`TABLE` is the one place that says so.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


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


def _kill_actor() -> object:
    import ray
    from ray._private.worker import global_worker  # noqa: F401

    return "worker.core_worker.kill_actor(actor._ray_actor_id, no_restart)" in inspect.getsource(ray.kill)


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
        module="cluster.ending", name="state", library="ray 2.60.0",
        why="tells which actors of Ray Data have not ended; the public list of actors needs a dashboard",
        upstream=NOT_FOUND, until="Ray Data ends its actors before it returns", holds=_actors,
    ),
    Private(
        module="cluster.ending", name="global_worker", library="ray 2.60.0",
        why="kills an actor of Ray Data, whose handle nobody else gets, where it does not end",
        upstream=NOT_FOUND, until="Ray Data ends its actors before it returns", holds=_kill_actor,
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
