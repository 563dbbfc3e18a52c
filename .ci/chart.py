"""Lints and renders the Helm chart by Helm's own library, and checks what is rendered.

chart.py OUT [--write]: OUT is a folder for the rendered manifests, one folder for each example. With --write,
what is generated is written instead of compared: the chart's README, its copy of the alerts, and deploy/kubernetes.
"""

import json
import os
import re
import subprocess
import sys
import tomllib

import helm_python as helm
import kubernetes_validate
import yaml

CHART = "deploy/helm/mini-lb"
EXAMPLES = "deploy/helm/examples"
# Rendered as a file each in deploy/kubernetes, with the example for DNS.
PLAIN = ["config", "deployment", "service", "disruption"]
# The release's name and namespace for each example.
RELEASES = {
    "dns": ("mini-lb", "llm"),
    "api": ("mini-lb", "llm"),
    "two-models-llama": ("llama", "llm"),
    "two-models-qwen": ("qwen", "llm"),
}
# What kubernetes-validate knows; others are custom resources, for manifests.mjs.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "HTTPRoute"}
GENERATED = "# Generated from deploy/helm with `.ci/deploy --write`: the chart with deploy/helm/examples/dns.yaml.\n"


def read(path):
    with open(path) as file:
        return file.read()


def hold(path, wanted, write):
    """Compares a generated file with what it should be, or writes it."""
    if write:
        with open(path, "w") as file:
            file.write(wanted)
    assert read(path) == wanted, f"{path} is not up to date: run `.ci/deploy --write`"


def rows(schema, values, path=""):
    """Path, default and description of each value, in the order of values.yaml."""
    for name, value in values.items():
        described = schema["properties"][name]
        here = f"{path}.{name}" if path else name
        if described.get("properties"):
            yield from rows(described, value, here)
        else:
            yield here, json.dumps(value, ensure_ascii=False), described["description"]
    unused = set(schema["properties"]) - set(values) - {"global"}
    assert not unused, f"{path}: in the schema only: {unused}"


def readme(schema, values):
    text = """# The chart mini-lb

Generated from `values.schema.json` and `values.yaml`. [Examples](../examples) are one model with discovery by DNS and by
the API server, and two models side by side.

```text
helm install mini-lb deploy/helm/mini-lb --namespace llm --create-namespace --set image.repository=REGISTRY/mini-lb
```

| value | default | meaning |
|---|---|---|
"""
    for path, default, meaning in rows(schema, values):
        text += f"| `{path}` | `{default}` | {meaning} |\n"
    return text


def documents(rendered):
    """The template's name and each manifest, without empty ones."""
    for path, text in rendered.items():
        if path.endswith(".yaml"):
            for document in yaml.safe_load_all(text):
                if document:
                    yield os.path.basename(path).removesuffix(".yaml"), document


def check_fit(manifests, namespace):
    """What a schema cannot say: the parts fit each other."""
    by_kind = {}
    for manifest in manifests:
        by_kind.setdefault(manifest["kind"], []).append(manifest)
    one = lambda kind: by_kind[kind][0] if len(by_kind.get(kind, [])) == 1 else None
    asked = tomllib.loads(one("ConfigMap")["data"]["config.toml"])
    deployment = one("Deployment")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    [container] = pod["spec"]["containers"]
    services = {service["metadata"]["name"]: service for service in by_kind["Service"]}
    clients = services[deployment["metadata"]["name"]]
    metrics = services[deployment["metadata"]["name"] + "-metrics"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], clients["spec"]["selector"], metrics["spec"]["selector"]]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in by_kind.get("PodDisruptionBudget", [])]
    for selector in selectors:
        assert selector.items() <= labels.items(), selector
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": asked["port"], "metrics": asked["prometheus_port"]}, ports
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    [clients_port], [metrics_port] = clients["spec"]["ports"], metrics["spec"]["ports"]
    assert clients_port["targetPort"] == "http" and metrics_port["targetPort"] == "metrics"
    ends = asked["shutdown_lame_duck_secs"] + asked["shutdown_grace_period_secs"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > ends, "requests would be cut off"
    ready = container["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] < asked["shutdown_lame_duck_secs"], "clients would be refused"
    assert ready["httpGet"]["path"] == "/ready" and container["livenessProbe"]["httpGet"]["path"] == "/health"
    [volume] = pod["spec"]["volumes"]
    assert volume["configMap"]["name"] == one("ConfigMap")["metadata"]["name"]
    headless = {name for name, service in services.items() if service["spec"].get("clusterIP") == "None"}
    dns = [entry[0] for entry in asked.get("prefill_dns", [])] + asked.get("decode_dns", [])
    assert {name.split(".")[0] for name in dns} == headless - {metrics["metadata"]["name"]}, (dns, headless)
    for name in dns:
        host, port = name.split(":")
        service = services[host.split(".")[0]]
        assert host.split(".")[1:3] == [namespace, "svc"] and service["spec"]["ports"][0]["port"] == int(port), name
    may_read = asked.get("service_discovery", False)
    assert pod["spec"]["automountServiceAccountToken"] == may_read
    assert ("Role" in by_kind) == may_read
    if may_read:
        role, binding, account = one("Role"), one("RoleBinding"), one("ServiceAccount")
        assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
        assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == asked["service_discovery_namespace"]
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        [subject] = binding["subjects"]
        assert subject["name"] == account["metadata"]["name"] == pod["spec"]["serviceAccountName"]
        assert subject["namespace"] == namespace
        for key in ("prefill_selector", "decode_selector"):
            assert asked[key] and all("=" in label for label in asked[key]), key
    for scaler in by_kind.get("HorizontalPodAutoscaler", []):
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert "replicas" not in deployment["spec"], "an upgrade would undo the scaling"
        wanted = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
        [rule] = yaml.safe_load(read("deploy/kubernetes/adapter-rule.yaml"))
        assert rule["name"]["as"] == wanted
    for monitor in by_kind.get("ServiceMonitor", []):
        found = [service for service in services.values()
                 if monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"].get("labels", {}).items()]
        assert found == [metrics], "Prometheus finds one service"
        assert monitor["spec"]["endpoints"][0]["port"] == metrics_port["name"]
    for rule in by_kind.get("PrometheusRule", []):
        assert rule["spec"] == yaml.safe_load(read("docs/alerts.yaml"))
    for route in by_kind.get("HTTPRoute", []):
        [backend] = route["spec"]["rules"][0]["backendRefs"]
        assert (backend["name"], backend["port"]) == (clients["metadata"]["name"], clients_port["port"])


def check_plain(folder, rendered, write):
    """deploy/kubernetes is the chart, rendered."""
    for name in PLAIN:
        wanted = GENERATED + re.sub(r"^---\n", "", rendered[f"mini-lb/templates/{name}.yaml"]).strip() + "\n"
        hold(f"{folder}/{name}.yaml", wanted, write)
    names = yaml.safe_load(read(f"{folder}/kustomization.yaml"))["resources"]
    assert sorted(names) == sorted(f"{name}.yaml" for name in PLAIN), names


def check_kustomized(folder):
    """What `kubectl apply --kustomize` would send: all of it in one namespace, with the release's image, and services
    for the pods that the README wants to be labelled."""
    said = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    manifests = list(yaml.safe_load_all(said))
    namespace = RELEASES["dns"][1]
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
        assert manifest["metadata"]["namespace"] == namespace, manifest["metadata"]
    check_fit(manifests, namespace)
    [image] = [manifest["spec"]["template"]["spec"]["containers"][0]["image"]
               for manifest in manifests if manifest["kind"] == "Deployment"]
    with open("Cargo.toml", "rb") as file:
        version = tomllib.load(file)["package"]["version"]
    assert image == f"mini-lb:{version}", image
    text = read("README.md").split("## Kubernetes")[1].split("## ")[0]
    assert f"kubectl apply --kustomize {folder}" in text and f"kubectl create namespace {namespace}" in text
    labels = {tuple(manifest["spec"]["selector"].items()) for manifest in manifests
              if manifest["kind"] == "Service" and manifest["metadata"]["name"] in ("prefill", "decode")}
    [(name, app)] = re.findall(r"`(app[^`]*): (\w+)`", text)
    [(label, role, other)] = re.findall(r"`(sglang/role): (\w+)` or `(\w+)`", text)
    assert labels == {((name, app), (label, role)), ((name, app), (label, other))}, labels


def main(out, write):
    hold(f"{CHART}/alerts.yaml", read("docs/alerts.yaml"), write)
    with helm.Chart.load(CHART) as chart:
        hold(f"{CHART}/README.md", readme(chart.schema, yaml.safe_load(read(f"{CHART}/values.yaml"))), write)
        examples = sorted(name.removesuffix(".yaml") for name in os.listdir(EXAMPLES))
        assert examples == sorted(RELEASES), examples
        for example, (release, namespace) in RELEASES.items():
            values = yaml.safe_load(read(f"{EXAMPLES}/{example}.yaml"))
            said = helm.lint(CHART, values, strict=True)
            # Severity 1 recommends an icon.
            assert not [said for said in said["messages"] if said["severity"] > 1] and not said["errors"], said
            rendered = chart.render(values, name=release, namespace=namespace)
            folder = f"{out}/{example}"
            os.makedirs(folder, exist_ok=True)
            found = list(documents(rendered))
            for number, (template, manifest) in enumerate(found):
                if manifest["kind"] not in CUSTOM:
                    kubernetes_validate.validate(manifest, "1.37", strict=True)
                with open(f"{folder}/{number:02}-{template}.json", "w") as file:
                    json.dump(manifest, file)
                if manifest["kind"] == "ConfigMap":
                    with open(f"{folder}/config.toml", "w") as file:
                        file.write(manifest["data"]["config.toml"])
            check_fit([manifest for _, manifest in found], namespace)
            assert rendered["mini-lb/templates/NOTES.txt"].startswith("Clients: http://")
            if example == "dns":
                check_plain("deploy/kubernetes", rendered, write)
        names = [{manifest["metadata"]["name"] for _, manifest in documents(chart.render(
            yaml.safe_load(read(f"{EXAMPLES}/two-models-{model}.yaml")), name=model, namespace="llm"))}
            for model in ("llama", "qwen")]
        assert not names[0] & names[1], "two releases have an object of one name"
        check_kustomized("deploy/kubernetes")
        for wrong in ({"replica": 3}, {"drain": {"lameDuckSeconds": 1}}, {"policy": "bucket"}):
            try:
                chart.validate_schema(wrong)
            except helm.HelmError:
                continue
            raise AssertionError(f"the schema accepts {wrong}")


main(sys.argv[1], "--write" in sys.argv)
