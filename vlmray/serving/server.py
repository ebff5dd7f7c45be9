"""Ray Serve application: gateways on CPUs in front of model replicas that batch what they are asked.

    proxy -> gateway (HTTP, images, protocol) -> handle -> ModelReplica (batches, adapters, engine) -> back

Started by `serve_app(config)`, by `jobs/serve.py`, by `serve run vlmray.serving:app model_id=builtin`, and by
a Serve config file with `import_path: vlmray.serving:app` and the options as `args`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from vlmray import cluster
from vlmray.config import ServeConfig
from vlmray.config.common import API_KEY
from vlmray.config.parsing import build_config
from vlmray.engines import calls_at_once, check_engine
from vlmray.engines.auto import EngineChoice, choose_engine
from vlmray.engines.fake import FakeEngine
from vlmray.errors import OptionError, RunError
from vlmray.models.source import ModelSource
from vlmray.models.templates.chat import check_template, with_template
from vlmray.serving.adapters import AdapterCatalog
from vlmray.serving.address import check_port, is_loopback
from vlmray.serving.gateway import Gateway
from vlmray.serving.handles import MAX_TRIES, MODEL_NAME, PATIENCE_S, Replicas
from vlmray.serving.http.app import build_app
from vlmray.serving.http.repeat import CALLBACK
from vlmray.serving.monitoring import Figures
from vlmray.serving.presence import Owner, find_owner, is_over, one_per_node, stop_running, wait_until_free
from vlmray.serving.replica import ModelReplica
from vlmray.storage.filesystem import absolute_uri

APP_NAME = "vlmray"

_LOG = logging.getLogger(__name__)
# What glibc does by itself, with many threads and bodies of megabytes, is to keep gigabytes of freed memory.
_GIVE_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}
_GATEWAY_NAME = "gateway"
_HEALTH_CHECK_PERIOD_S = 1.0  # what is lost is replaced that much later


@serve.ingress()
class GatewayReplica:
    """Takes HTTP requests and asks the model replicas; one of several.

    Args:
        config: The server's options.
        key_digest: SHA-256 of the API key; None lets everybody in.
        created: When the server was made, in seconds of the epoch.
        job_id: The job whose end ends the server; None: it stays.
        model: The model replicas.
    """

    def __init__(
        self, config: ServeConfig, key_digest: bytes | None, created: int, job_id: str | None,
        model: DeploymentHandle,
    ) -> None:  # fmt: skip
        least, _ = config.replica_range() or (1, 1)
        context = serve.get_replica_context()
        self._gateways = serve.get_deployment_handle(_GATEWAY_NAME, context.app_name)
        self._gateway = Gateway(
            config, Replicas(model, least, config.startup_timeout_s), created=created,
            name=context.replica_id.unique_id, all_figures=self._all_figures,
        )  # fmt: skip
        self._key_digest = key_digest
        self._job_id = job_id
        self._owner = _owner(config, job_id)

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._gateway, self._key_digest)

    async def check_health(self) -> None:
        """End the server once its driver is gone, killed or lost with its node: nobody else would."""
        over = self._job_id is not None and await asyncio.to_thread(is_over, self._job_id)
        if over:
            await asyncio.to_thread(serve.shutdown)

    async def figures(self) -> Figures:
        """Return what was counted here."""
        return self._gateway.figures()

    async def owner(self) -> Owner:
        """Tell whose server this is."""
        return self._owner

    async def drain(self, timeout_s: float) -> int:
        """Take no more requests and wait for those in progress; return how many are left."""
        return await self._gateway.drain(timeout_s)

    async def drain_all(self, timeout_s: float) -> int:
        """Have all gateways do so."""
        return sum(await self._ask_all("drain", timeout_s, timeout_s=timeout_s + PATIENCE_S))

    async def _all_figures(self) -> list[Figures]:
        try:
            return await self._ask_all("figures", timeout_s=PATIENCE_S)
        except TimeoutError:
            return [self._gateway.figures()]

    async def _ask_all(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call a method of all gateways; of those that are lost meanwhile there is no result."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    asked = self._gateways.broadcast(method, *args)
                    results = await asked.results_async(return_exceptions=True)
                    return [result for result in results if not isinstance(result, BaseException)]
                except DeploymentUnavailableError:  # before the first call the handle knows of none
                    await asyncio.sleep(0.05)


_MODEL: Any = serve.deployment(name=MODEL_NAME)(ModelReplica)
_GATEWAY: Any = serve.deployment(name=_GATEWAY_NAME, max_ongoing_requests=10_000)(GatewayReplica)


def build_application(config: ServeConfig, api_key: str | None = None) -> serve.Application:
    """Check the options and make the Serve application; Ray must be connected.

    Args:
        config: The server's options.
        api_key: Key that clients have to send; only its digest reaches the cluster. None: no key.

    Raises:
        ValueError: The cluster lacks the GPUs, the hub does not answer, or an adapter was made for another
            base.
        FileNotFoundError: A model or adapter is not there or lacks files.
    """
    return _bind(_check_model(choose_server_engine(config).settle(config)), api_key, job_id=None)


def _bind(config: ServeConfig, api_key: str | None, job_id: str | None) -> serve.Application:
    plan = cluster.plan_replicas(config.replica_range(), config.gpus_per_replica, config.cards)
    most_calls = calls_at_once(config.engine)
    batch = most_calls // 4 if most_calls > 1 else config.max_batch_size
    scaling: dict[str, Any] = {"num_replicas": plan.max_replicas}
    if plan.min_replicas != plan.max_replicas:
        look_back_s = max(1.0, min(30.0, config.upscale_delay_s))
        scaling = {
            "autoscaling_config": {
                "min_replicas": plan.min_replicas,
                "max_replicas": plan.max_replicas,
                "target_ongoing_requests": config.target_ongoing_requests or batch,
                "upscale_delay_s": config.upscale_delay_s,
                "downscale_delay_s": config.downscale_delay_s,
                "look_back_period_s": look_back_s,
                "metrics_interval_s": look_back_s / 3,
            }
        }
    logs = {"log_level": config.log_level, "enable_access_log": False}
    model = _MODEL.options(
        max_ongoing_requests=max(most_calls, 2 * batch),  # a batch in the model, and one that waits for it
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={
            "num_gpus": plan.num_gpus,
            "num_cpus": plan.num_cpus,
            "runtime_env": plan.runtime_env,
        },
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        logging_config=logs,
        **scaling,
    ).bind(config, plan.num_threads, plan.memory_fraction)
    digest = hashlib.sha256(api_key.encode()).digest() if api_key else None
    gateway = _GATEWAY.options(
        logging_config=logs,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _GIVE_MEMORY_BACK}},
        max_replicas_per_node=1,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 1 + plan.max_replicas,
            "policy": {"policy_function": one_per_node},
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
        },
    )
    application: serve.Application = gateway.bind(config, digest, int(time.time()), job_id, model)
    return application


def choose_server_engine(config: ServeConfig) -> EngineChoice:
    """Choose what answers.

    Raises:
        ValueError: An option is for an engine that is not installed.
    """
    return choose_engine(
        config,
        [config.model_id],
        [*config.adapter_paths().values()],
        find_cluster_objection=lambda: cluster.find_gpu_objection("vllm", config.log_level),
    )


def _check_model(config: ServeConfig) -> ServeConfig:
    """Check what a replica would only find after it started; return where that finds it, from any folder."""
    if config.engine == "fake":
        FakeEngine.parse_model_id(config.model_id)
        return config
    model = ModelSource.open(config.model_id)
    check_template(config, model.folder)
    adapters = config.adapter_paths()
    AdapterCatalog(model.path, adapters, config.adapter_dir).check()
    check_engine(config, config.model_id, [path for path in adapters.values() if "://" not in path])
    return dataclasses.replace(
        with_template(config),
        model_id=model.address,
        served_model_name=config.base_name,
        adapters=",".join(f"{name}={absolute_uri(path)}" for name, path in adapters.items()) or None,
        adapter_dir=config.adapter_dir and absolute_uri(config.adapter_dir),
    )


def app(args: Mapping[str, Any]) -> serve.Application:
    """Build the application for `serve run` and Serve config files; `args` are options of `ServeConfig`."""
    return build_application(build_config(ServeConfig, args), os.environ.get(API_KEY))


class Server:
    """A running server; a context manager that stops it.

    Attributes:
        url: Where it is, without `/v1`.
        choice: The engine that answers.
    """

    def __init__(self, config: ServeConfig, choice: EngineChoice, handle: DeploymentHandle, url: str) -> None:
        self.config = config
        self.choice = choice
        self.url = url
        self._handle = handle
        self._stopped = False

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Answer what is in progress, refuse the rest, stop; return how many requests were cut off.

        Calling it twice is harmless.
        """
        if self._stopped:
            return 0
        self._stopped = True
        owner = find_owner(APP_NAME)
        if owner is not None and owner != _owner(self.config, ray.get_runtime_context().get_job_id()):
            return 0  # another has taken its place
        timeout_s = self.config.drain_timeout_s
        try:
            return int(self._handle.drain_all.remote(timeout_s).result(timeout_s=timeout_s + 10))
        finally:
            serve.shutdown()


def serve_app(config: ServeConfig) -> Server:
    """Start a server on the cluster this process belongs to, or on a Ray of its own; wait until it answers.

    The API key is taken from the environment variable `VLMRAY_API_KEY`.

    Raises:
        ValueError: An option does not fit, the hub does not answer, the port is taken, an address that
            others reach has no API key, or the cluster has a server already.
        FileNotFoundError: A model or adapter is not there or lacks files.
        RunError: The replicas do not start.
    """
    api_key = os.environ.get(API_KEY)
    if not api_key and not is_loopback(config.host):
        raise OptionError(
            "host",
            f"{config.host} lets others in",
            f"set {API_KEY} to a key that they have to send, or listen on 127.0.0.1",
        )
    if not config.replace:
        check_port(config.host, config.port)
    choice = choose_server_engine(config)
    config = _check_model(choice.settle(config))  # before Ray, which takes seconds to start
    cluster.connect(config.log_level)
    logging.getLogger("ray.serve").setLevel(config.log_level)
    if config.replace:
        stop_running(APP_NAME, config.drain_timeout_s)
        check_port(config.host, config.port)
    else:
        wait_until_free(APP_NAME)
    application = _bind(config, api_key, ray.get_runtime_context().get_job_id())
    try:
        with cluster.saying_what_is_awaited(_asked(config), config.wait_for_resources_s):
            handle = _start(config, application)
    except (KeyboardInterrupt, RunError):
        serve.shutdown()  # or it would go on starting on a cluster that stays
        raise
    except RuntimeError as error:
        serve.shutdown()
        raise RunError(f"the server does not start: {cluster.root_cause(error)}") from error
    return Server(config, choice, handle, _url(config))


def _owner(config: ServeConfig, job_id: str | None) -> Owner:
    return Owner(config.base_name, _url(config), job_id)


def _url(config: ServeConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}"


def _start(config: ServeConfig, application: serve.Application) -> DeploymentHandle:
    """Start Serve and the application, again where a server that was about to end took Serve along."""
    for tries_left in reversed(range(MAX_TRIES)):
        try:
            serve.start(
                proxy_location="EveryNode",
                http_options={"host": config.host, "port": config.port},
                controller_options={"runtime_env": {"env_vars": CALLBACK}},  # proxies have what it has
            )
            return serve.run(application, name=APP_NAME, route_prefix="/")
        except RayActorError:
            if not tries_left:
                raise
            serve.shutdown()
    raise AssertionError("the last try returns or raises")


def _asked(config: ServeConfig) -> cluster.Asked:
    plan = cluster.plan_replicas(config.replica_range(), config.gpus_per_replica, config.cards)
    return plan.asked(f"ServeReplica:{APP_NAME}:{MODEL_NAME}", is_served=True)
