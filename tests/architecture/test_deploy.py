"""The manifests for KubeRay and the Dockerfile say what KubeRay, Ray and vlmray take.

The tables of fields are those of KubeRay 1.7's `ray.io/v1` and of Kubernetes, as far as they are used here:
what a manifest has beside them is a field that nobody reads, and has to be looked up before it is added.
"""

from __future__ import annotations

import copy
import json
import pydoc
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from helpers.paths import ROOT
from vlmray.cli import JOBS
from vlmray.config import ServeConfig
from vlmray.config.parsing import build_config, parse_args

DEPLOY = ROOT / "deploy"
NAMES = ("raycluster", "rayjob-infer", "rayjob-finetune", "rayservice")

TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(known: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": known, "required": [*required], "additionalProperties": False}


def several(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": [*values]}


KEY = fields({"name": TEXT, "key": TEXT, "optional": FLAG}, "name", "key")
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = fields(
    {
        "name": TEXT, "image": TEXT,
        "ports": several(fields({"name": TEXT, "containerPort": COUNT}, "containerPort")),
        "env": several(
            fields({"name": TEXT, "value": TEXT, "valueFrom": fields({"secretKeyRef": KEY})}, "name")
        ),
        "lifecycle": fields({"preStop": fields({"exec": fields({"command": several(TEXT)}, "command")})}),
        "resources": fields({"limits": QUANTITIES, "requests": QUANTITIES}, "limits", "requests"),
    },
    "name", "image", "resources",
)  # fmt: skip
TOLERATION = fields(
    {
        "key": TEXT, "value": TEXT, "operator": one_of("Exists", "Equal"),
        "effect": one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    },
    "key", "operator",
)  # fmt: skip
POD = fields(
    {
        "containers": several(CONTAINER), "nodeSelector": TEXTS, "tolerations": several(TOLERATION),
        "terminationGracePeriodSeconds": COUNT,
    },
    "containers",
)  # fmt: skip
TEMPLATE = fields({"spec": POD}, "spec")
CLUSTER = fields(
    {
        "rayVersion": TEXT,
        "authOptions": fields({"mode": one_of("token", "disabled"), "secretName": TEXT}, "mode"),
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": fields(
            {"idleTimeoutSeconds": COUNT, "upscalingMode": one_of("Default", "Conservative")}
        ),
        "headGroupSpec": fields(
            {"rayStartParams": TEXTS, "template": TEMPLATE}, "rayStartParams", "template"
        ),
        "workerGroupSpecs": several(
            fields(
                {
                    "groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
                    "rayStartParams": TEXTS, "template": TEMPLATE,
                },
                "groupName", "minReplicas", "maxReplicas", "rayStartParams", "template",
            )
        ),
    },
    "rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs",
)  # fmt: skip
JOB = fields(
    {
        "entrypoint": TEXT, "clusterSelector": TEXTS,
        "submissionMode": one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    },
    "entrypoint", "clusterSelector",
)  # fmt: skip
SERVICE = fields({"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER}, "serveConfigV2", "rayClusterConfig")
DNS_LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}


def kind_of(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = fields({"name": DNS_LABEL}, "name")
    known = {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": kind},
        "metadata": metadata,
        "spec": spec,
    }
    return fields(known, *known)


KINDS = {
    "RayCluster": kind_of("RayCluster", CLUSTER),
    "RayJob": kind_of("RayJob", JOB),
    "RayService": kind_of("RayService", SERVICE),
}


def read(name: str) -> dict[str, Any]:
    manifest = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text(encoding="utf-8"))
    return json.loads(json.dumps(manifest))  # what anchors share may be changed in one place


def check(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, KINDS[manifest["kind"]])


def cluster_of(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return spec.get("rayClusterConfig", spec)


def containers(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects_in(inner)


def ray_version() -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (version,) = [line.removeprefix("ray==") for line in lines if line.startswith("ray==")]
    return version


def test_every_manifest_is_looked_at() -> None:
    assert {path.stem for path in DEPLOY.glob("*.y*ml")} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_manifests_have_the_fields_of_kuberay(name: str) -> None:
    check(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelled_or_missing_field_is_found_anywhere(name: str) -> None:
    """The tables can fail: what takes any key takes texts alone, and no number."""
    manifest = read(name)
    for number, _ in enumerate(objects_in(manifest)):
        broken = copy.deepcopy(manifest)
        place = [*objects_in(broken)][number]
        place["misspelled"] = 1
        with pytest.raises(jsonschema.ValidationError):
            check(broken)
    for field in manifest["spec"]:
        if field in KINDS[manifest["kind"]]["properties"]["spec"]["required"]:
            broken = copy.deepcopy(manifest)
            del broken["spec"][field]
            with pytest.raises(jsonschema.ValidationError, match="required"):
                check(broken)


@pytest.mark.parametrize("name", ["raycluster", "rayservice"])
def test_clusters_have_a_head_that_stays_and_gpu_workers_from_one(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["enableInTreeAutoscaling"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert "nodeSelector" not in head["template"]["spec"]  # a spot node among others
    assert 1 == workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    (head_container,), (container,) = (group["template"]["spec"]["containers"] for group in (head, workers))
    assert "nvidia.com/gpu" not in head_container["resources"]["limits"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for each in (head_container, container):
        assert each["resources"]["limits"] == each["resources"]["requests"]
        assert each["image"] == container["image"]


@pytest.mark.parametrize("name", ["raycluster", "rayservice"])
def test_a_pod_that_ends_tells_ray_in_time(name: str) -> None:
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.scripts.scripts import drain_node

    (workers,) = cluster_of(name)["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (*shell, line) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert shell == ["bash", "-c"]
    told, waited = line.split(" && ")
    words = shlex.split(told)
    assert words[:2] == ["ray", "drain-node"]
    given = drain_node.make_context("drain-node", words[2:]).params
    assert given["reason"] in DrainNodeReason.keys()  # noqa: SIM118  # protobuf's, no dict
    assert shlex.split(waited) == ["sleep", str(given["deadline_remaining_seconds"])]
    assert given["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]


def test_the_service_has_the_cluster_of_the_jobs() -> None:
    """They are two files of one text: what is changed in one is changed in the other."""
    cluster, service = cluster_of("raycluster"), cluster_of("rayservice")
    for container in containers(service):
        key = {"secretKeyRef": {"name": "vlmray-keys", "key": "VLMRAY_API_KEY"}}
        container["env"].remove({"name": "VLMRAY_API_KEY", "valueFrom": key})
        assert container["env"]
    head = next(containers(service))
    head["ports"].remove({"name": "serve", "containerPort": 8000})
    assert service == cluster


def test_a_secret_of_ours_is_not_the_one_in_which_kuberay_keeps_its_token() -> None:
    names = {
        value["secretKeyRef"]["name"]
        for name in ("raycluster", "rayservice")
        for value in objects_in(read(name))
        if "secretKeyRef" in value
    }
    assert names == {"vlmray-keys"}
    assert not names & {read(name)["metadata"]["name"] for name in NAMES}
    for name in ("raycluster", "rayservice"):
        assert "create secret generic vlmray-keys " in (DEPLOY / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["rayjob-infer", "rayjob-finetune"])
def test_jobs_run_commands_that_are_accepted(name: str) -> None:
    spec = read(name)["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": read("raycluster")["metadata"]["name"]}
    assert spec["submissionMode"] == "HTTPMode"  # others have the shell of a pod of their own read it
    commands = [shlex.split(command) for command in spec["entrypoint"].split(" || ")]
    for command in commands:
        assert command[:2] == ["vlmray", name.removeprefix("rayjob-")]
        config = parse_args(JOBS[command[1]].config_class, command[2:])
        assert config.output_dir.startswith("s3://")
    if len(commands) == 2:
        assert commands[0] == [*commands[1], "--resume"]
        least = read("raycluster")["spec"]["workerGroupSpecs"][0]["minReplicas"]
        assert config.worker_range() == (least, 8)  # more are refused where only the first is there


def serve_config(change: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**yaml.safe_load(read("rayservice")["spec"]["serveConfigV2"]), **(change or {})}


def test_serve_takes_its_config_and_vlmray_the_options_in_it() -> None:
    from ray.serve.schema import ServeDeploySchema

    from vlmray import serving
    from vlmray.serving.server import APP_NAME

    given = serve_config()
    accepted = ServeDeploySchema.model_validate(given)
    assert given.keys() <= accepted.model_dump().keys()  # extra ones would be dropped unsaid
    (application,) = accepted.applications
    assert given["applications"][0].keys() <= application.model_dump().keys()
    assert (application.name, application.import_path) == (APP_NAME, "vlmray.serving:app")
    assert callable(serving.app)
    callbacks = [*given["controller_options"]["runtime_env"]["env_vars"].values()]
    assert [callable(pydoc.locate(path.replace(":", "."))) for path in callbacks] == [True]
    config = build_config(ServeConfig, application.args)
    assert config.replica_range() == (
        0,
        read("rayservice")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"],
    )


@pytest.mark.parametrize("change", [{"proxy_location": "Nowhere"}, {"http_options": {"port": "http"}}])
def test_the_check_of_serves_config_can_fail(change: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate(serve_config(change))
    with pytest.raises(ValueError, match="num_replica"):
        build_config(ServeConfig, {"num_replica": 1})


def test_every_ray_is_the_tested_one() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE) == [
        f"rayproject/ray:{ray_version()}-py311-${{PLATFORM}}"
    ]
    for name in ("raycluster", "rayservice"):
        assert cluster_of(name)["rayVersion"] == ray_version()


def test_the_image_gets_what_it_installs_and_nothing_else() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = {
        source
        for line in re.findall(r"^COPY \S+ (.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    }
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "vlmray"} <= copied
    assert not re.search(r"^USER (root|0)\b", dockerfile, re.MULTILINE)
    assert all("-c constraints.txt" in line for line in re.findall(r"^RUN pip.*$", dockerfile, re.MULTILINE))
