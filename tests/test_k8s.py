"""The manifests of k8s/, checked offline: API schemas, our own promises about them, and the rendered overlays."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from service.config import Settings, load_settings
from service.engine.remote_engine import END_SECONDS
from service.server import ABANDON_SECONDS

K8S = Path(__file__).resolve().parent.parent / "k8s"
KUSTOMIZATIONS = sorted(path.parent for path in K8S.rglob("kustomization.yaml"))
COMPONENTS = [path for path in KUSTOMIZATIONS if path.parent.name == "components"]
"""Parts of overlays: they render with a base only."""
SCHEMA_VERSIONS = ("1.35", "1.37")
ALERT = {"alert", "expr", "for", "labels", "annotations"}
LABEL = {"app.kubernetes.io/name": "rootstock"}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def load(name: str, folder: str = "base") -> dict[str, Any]:
    document = yaml.safe_load((K8S / folder / name).read_text())
    assert isinstance(document, dict)
    return document


def settings_of(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def pod_spec() -> dict[str, Any]:
    spec: dict[str, Any] = load("deployment.yaml")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod_spec()["containers"]
    assert isinstance(only, dict)
    return only


def check_schema(document: dict[str, Any], version: str) -> None:
    """Strict validation; the operator's resources, whose schemas are no part of Kubernetes, are checked by hand."""
    check = {"PodMonitor": check_pod_monitor, "PrometheusRule": check_prometheus_rule}.get(document["kind"])
    if check is None:
        kubernetes_validate.validate(document, version, strict=True)
        return
    assert document["apiVersion"] == "monitoring.coreos.com/v1"
    check(document)


def check_prometheus_rule(document: dict[str, Any]) -> None:
    """Every value of a rule is text, as the operator's schema wants it; promtool reads the same groups elsewhere."""
    assert set(document["spec"]) == {"groups"}
    names = [group["name"] for group in document["spec"]["groups"]]
    assert len(names) == len(set(names))
    for group in document["spec"]["groups"]:
        assert set(group) <= {"name", "interval", "rules"} and group["rules"]
        for rule in group["rules"]:
            assert set(rule) in ({"record", "expr"}, {"record", "expr", "labels"}, ALERT)
            texts = [rule["expr"], *rule.get("labels", {}).values(), *rule.get("annotations", {}).values()]
            assert all(isinstance(text, str) and text for text in texts)


def check_pod_monitor(document: dict[str, Any]) -> None:
    assert set(document["spec"]) == {"selector", "podMetricsEndpoints"}
    assert document["spec"]["selector"]["matchLabels"] == LABEL
    (endpoint,) = document["spec"]["podMetricsEndpoints"]
    assert set(endpoint) <= {"port", "path", "interval", "honorLabels"}


@pytest.mark.parametrize("version", SCHEMA_VERSIONS)
@pytest.mark.parametrize("name", load("kustomization.yaml")["resources"])
def test_every_resource_of_the_base_obeys_its_schema(name: str, version: str) -> None:
    check_schema(load(name), version)


@pytest.mark.parametrize("name", load("kustomization.yaml", "monitoring")["resources"])
def test_every_resource_of_monitoring_has_the_operators_form(name: str) -> None:
    check_schema(load(name, "monitoring"), SCHEMA_VERSIONS[-1])


def test_the_base_needs_no_operator() -> None:
    kinds = {load(name)["apiVersion"] for name in load("kustomization.yaml")["resources"]}
    assert kinds == {"v1", "apps/v1", "networking.k8s.io/v1"}


@pytest.mark.parametrize("directory", KUSTOMIZATIONS, ids=lambda path: str(path.name))
def test_a_kustomization_lists_every_manifest_beside_it_and_nothing_that_is_missing(directory: Path) -> None:
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
    assert all((directory / name).exists() for name in kustomization["resources"])
    beside = {path.name for path in directory.glob("*.yaml")} - {"kustomization.yaml"}
    assert beside <= set(kustomization["resources"])


@pytest.mark.parametrize("path", sorted(K8S.rglob("settings.env")), ids=lambda path: str(path.parent.name))
def test_every_setting_of_a_config_map_is_one_the_service_accepts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = settings_of(K8S / "base" / "settings.env") | settings_of(path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(environ=variables)
    assert settings.host == "0.0.0.0"


def test_ports_probes_and_service_agree_with_the_settings() -> None:
    variables = settings_of(K8S / "base" / "settings.env")
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"api": int(variables["ROOTSTOCK_PORT"]), "ops": int(variables["ROOTSTOCK_OPS_PORT"])}
    probes = {kind: container()[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {"ops"}
    assert (probes["readiness"]["path"], probes["liveness"]["path"]) == ("/readyz", "/livez")
    assert [port["targetPort"] for port in load("service.yaml")["spec"]["ports"]] == ["api"]


def test_running_answers_have_time_to_finish_before_the_pod_is_killed() -> None:
    drain = float(settings_of(K8S / "base" / "settings.env")["ROOTSTOCK_DRAIN_SECONDS"])
    pre_stop = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_spec()["terminationGracePeriodSeconds"] >= pre_stop + drain + END_SECONDS + ABANDON_SECONDS
    assert container()["readinessProbe"]["periodSeconds"] * container()["readinessProbe"]["failureThreshold"] <= drain
    liveness, stall = container()["livenessProbe"], Settings().stall_seconds
    assert liveness["periodSeconds"] * liveness["failureThreshold"] <= stall, "noticed within two stalls"


def test_one_pod_owns_the_device_and_the_volume() -> None:
    deployment = load("deployment.yaml")["spec"]
    assert deployment["replicas"] == 1 and deployment["strategy"]["type"] == "Recreate"
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (claim,) = [v["persistentVolumeClaim"]["claimName"] for v in pod_spec()["volumes"] if "persistentVolumeClaim" in v]
    assert claim == load("persistentvolumeclaim.yaml")["metadata"]["name"]
    data = settings_of(K8S / "base" / "settings.env")["ROOTSTOCK_DATA_DIR"]
    assert data in [mount["mountPath"] for mount in container()["volumeMounts"]]


def test_the_pod_meets_the_restricted_pod_security_standard() -> None:
    pod, own = pod_spec()["securityContext"], container()["securityContext"]
    assert pod["runAsNonRoot"] is True and pod["runAsUser"] == 10001
    assert pod["seccompProfile"]["type"] == "RuntimeDefault"
    assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
    assert own["capabilities"]["drop"] == ["ALL"]
    assert load("namespace.yaml")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod_spec()["automountServiceAccountToken"] is False


def test_service_links_are_off_because_their_variables_would_read_as_settings() -> None:
    assert pod_spec()["enableServiceLinks"] is False


def test_keys_come_from_the_secret_and_never_from_the_config_map() -> None:
    secret = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container()["env"]}
    assert secret["ROOTSTOCK_ADMIN_KEY"] == {"name": "rootstock", "key": "admin-key"}
    for path in K8S.rglob("settings.env"):
        assert not [name for name in settings_of(path) if "KEY" in name or "URL" in name]
    assert {name.removeprefix("ROOTSTOCK_").lower() for name in secret} <= set(Settings.model_fields)


def test_only_labelled_namespaces_reach_the_api_and_only_monitoring_reaches_the_ops_port() -> None:
    policy = load("networkpolicy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == LABEL and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    allowed = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
    assert set(allowed) == {"api", "ops"}
    assert allowed["api"] == [{"namespaceSelector": {"matchLabels": {"rootstock-client": "true"}}}]
    assert allowed["ops"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


@needs_kubectl
@pytest.mark.parametrize(
    "directory", [path for path in KUSTOMIZATIONS if path not in COMPONENTS], ids=lambda path: str(path.name)
)
def test_every_kustomization_renders_to_valid_manifests_in_one_namespace(directory: Path) -> None:
    documents = render(directory)
    for document in documents:
        check_schema(document, SCHEMA_VERSIONS[-1])
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "rootstock"


@needs_kubectl
def test_monitoring_renders_dashboards_for_the_sidecar_and_links_that_lead_where_links_env_says(tmp_path: Path) -> None:
    copy = shutil.copytree(K8S / "monitoring", tmp_path / "monitoring")
    links = {"GRAFANA": "https://grafana.my.org", "RUNBOOKS": "https://docs.my.org/operations.md"}
    (copy / "links.env").write_text("".join(f"{name}={url}\n" for name, url in links.items()))
    kinds = {document["kind"]: document for document in render(copy)}
    assert set(kinds) == {"ConfigMap", "PodMonitor", "PrometheusRule"}  # the links' own ConfigMap stays here
    dashboards = kinds["ConfigMap"]
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {f"{name}.json" for name in ("rootstock-service", "rootstock-tenants", "rootstock-training")} == set(
        dashboards["data"]
    )
    assert all(json.loads(text)["panels"] for text in dashboards["data"].values())
    rules = [rule for group in kinds["PrometheusRule"]["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    for notes in (rule["annotations"] for rule in rules):
        assert notes["dashboard_url"].startswith(f"{links['GRAFANA']}/d/rootstock-")
        assert notes["runbook_url"].startswith(f"{links['RUNBOOKS']}#rootstock")


@needs_kubectl
def test_the_cpu_overlay_asks_for_no_gpu_and_uses_the_cpu_image() -> None:
    (deployment,) = [document for document in render(K8S / "overlays" / "cpu") if document["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in spec["containers"][0]["resources"]["limits"] and "tolerations" not in spec
    assert spec["containers"][0]["image"] == "rootstock:0.1.0"


@pytest.mark.slow
@needs_kubectl
def test_with_the_component_of_traces_the_pod_knows_its_collector_and_may_reach_it(tmp_path: Path) -> None:
    copy = shutil.copytree(K8S, tmp_path / "k8s")
    cpu = copy / "overlays" / "cpu" / "kustomization.yaml"
    cpu.write_text(f"{cpu.read_text()}components: [../../components/traces]\n")
    documents = render(cpu.parent)
    for document in documents:
        check_schema(document, SCHEMA_VERSIONS[-1])
    (settings,) = [document["data"] for document in documents if document["kind"] == "ConfigMap"]
    collector = urlsplit(settings["ROOTSTOCK_OTLP_ENDPOINT"])
    assert settings["ROOTSTOCK_DATA_DIR"] == "/data"
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    assert set(policies) == {"rootstock", "rootstock-traces"}
    assert policies["rootstock-traces"]["podSelector"] == policies["rootstock"]["podSelector"]
    (rule,) = policies["rootstock-traces"]["egress"]
    (peer,) = rule["to"]
    namespace = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert (collector.hostname or "").endswith(f".{namespace}")
    assert [port["port"] for port in rule["ports"]] == [collector.port]


def render(directory: Path) -> list[dict[str, Any]]:
    result = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))
