"""cluster.yaml is what Ray's cluster launcher accepts, and agrees with the rest of the repository."""

from typing import Any

import pytest
import yaml

from helpers.paths import ROOT


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it_with_its_defaults_filled_in(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_the_schema_check_can_fail(config: dict[str, Any]) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError):
        validate_config(prepare_config({**config, "gpu_workers": 3}))


def test_head_has_no_gpu_and_gpu_workers_scale_from_zero(config: dict[str, Any]) -> None:
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["resources"]["GPU"] == 0
    (workers,) = [node for node in nodes.values() if node["resources"]["GPU"] > 0]
    assert workers["min_workers"] == 0
    assert 0 < workers["max_workers"] <= config["max_workers"]


def test_spot_is_for_workers_alone(config: dict[str, Any]) -> None:
    markets = {
        name: node["node_config"].get("InstanceMarketOptions")
        for name, node in config["available_node_types"].items()
    }
    assert markets.pop(config["head_node_type"]) is None
    assert [*markets.values()] == [{"MarketType": "spot"}]


def test_image_has_the_tested_ray_version(config: dict[str, Any]) -> None:
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    (version,) = [line.removeprefix("ray==") for line in tested if line.startswith("ray==")]
    assert f":{version}-" in config["docker"]["image"]
