"""The files of deploy/: they parse, say what the commands take, and agree with one another."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import planrt
from planrt import cli
from planrt.fl import mnist_async, serve
from planrt.fl.runs.run_metrics import RunMetrics, WatchedJob
from planrt.workers import VirtualWorker
from tests.watching import samples

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def parsed(words: list[str]):
    """The options of one of planrt's commands, which must take these words."""
    parsers = {"serve": serve.parser("planrt serve"), "run": mnist_async.parser("planrt run")}
    if words[0] in parsers:
        return parsers[words[0]].parse_args(words[1:])
    return cli._parser().parse_args(words)


def test_each_file_is_looked_at_here():
    found = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    found = {name for name in found if not name.startswith(("certs/", "secrets/"))}
    assert found == {
        "README.md", "Dockerfile", "Dockerfile.dockerignore", "compose.yaml", "prometheus/prometheus.yml",
        "grafana/planrt.json", "kubernetes/worker.yaml", "systemd/planrt-worker@.service",
    }  # fmt: skip


# ------------------------------------------------------------------------------------- Dockerfile

INSTRUCTIONS = {
    "ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "STOPSIGNAL", "ENTRYPOINT", "CMD"
}  # fmt: skip


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines]


def test_the_image_has_what_it_copies_and_runs_as_nobody():
    lines = dockerfile()
    ignoring = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = {line.removeprefix("!") for line in ignoring if line.startswith("!")}
    assert ignoring[1] == "*"
    assert {name for name, _ in lines} <= INSTRUCTIONS
    said = dict(lines)
    assert said["USER"] not in ("root", "0")
    assert [name for name, _ in lines].index("USER") > max(
        place for place, (name, _) in enumerate(lines) if name == "RUN"
    )
    for name, rest in lines:
        if name == "COPY":
            assert all((ROOT / one).exists() for one in rest.split()[:-1]), rest
            assert {one.removeprefix("./") for one in rest.split()[:-1]} <= let_through, rest
    assert json.loads(said["ENTRYPOINT"]) == ["planrt"]
    assert said["STOPSIGNAL"] == "SIGTERM"
    extras = re.search(
        r'"\.\[([\w,]+)\]"', said["RUN"] + "".join(rest for name, rest in lines if name == "RUN")
    )
    assert extras
    assert {"run", "metrics"} <= set(extras[1].split(","))


def test_what_the_readme_makes_is_not_committed():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/deploy/certs/", "/deploy/secrets/"} <= set(ignored)


# ---------------------------------------------------------------------------------------- compose


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def ours(compose):
    return {name: one for name, one in compose["services"].items() if one["image"].startswith("planrt")}


def test_compose_has_a_coordinator_and_its_workers(compose):
    services = ours(compose)
    assert set(services) == {"alice", "bob", "charlie", "testing", "coordinator"}
    for name, service in services.items():
        words = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in service["command"]]
        options = parsed(words)
        assert (options.metrics_port, service["hostname"]) == (9100, name)
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "ports" not in service  # nothing is reached from outside
        check = service["healthcheck"]["test"]
        assert check[:2] == ["CMD", "planrt"]
        assert parsed(check[2:]).run == "http://127.0.0.1:9100"
        mounts = [one.split(":") for one in service["volumes"]]
        inside = {target for _, target, *_ in mounts}
        for word in words:
            assert not word.startswith(("/certs", "/secrets")) or word in inside, word
        for source, target, *mode in mounts:
            assert not target.endswith("-key.pem") or target == f"/certs/{name}-key.pem"  # its own key alone
            assert mode == ["ro"] or source in compose["volumes"]
    asked = dict(parsed([re.sub(r"\$\{.*\}", "2", one) for one in services["coordinator"]["command"]]).worker)
    assert asked == {name: f"wss://{name}:8777" for name in services if name != "coordinator"}
    assert set(services["coordinator"]["depends_on"]) == set(asked)


def test_prometheus_scrapes_each_of_them(compose):
    said = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = said["scrape_configs"]
    (targets,) = (one["targets"] for one in job["static_configs"])
    assert set(targets) == {f"{name}:9100" for name in ours(compose)}
    assert job["job_name"] == "planrt"


# ------------------------------------------------------------------------------------- Kubernetes


def test_the_pod_runs_a_worker_and_is_contained():
    worker, service, policy = yaml.safe_load_all((DEPLOY / "kubernetes" / "worker.yaml").read_text())
    assert [one["kind"] for one in (worker, service, policy)] == ["StatefulSet", "Service", "NetworkPolicy"]
    spec = worker["spec"]["template"]["spec"]
    (container,), (first,) = spec["containers"], spec["initContainers"]
    options = parsed(container["args"])
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert (options.port, options.metrics_port) == (ports["wss"], ports["metrics"])
    assert worker["spec"]["replicas"] == 1
    assert worker["spec"]["serviceName"] == service["metadata"]["name"]
    assert options.allow_host == [service["metadata"]["name"]]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"] == {"path": "/health", "port": "metrics"}
    labels = worker["spec"]["template"]["metadata"]["labels"]
    for selector in (
        worker["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        policy["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert service["spec"]["ports"][0]["port"] == options.port
    assert {rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]} == set(ports.values())
    for one in (container, first):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
    copied = {f"/secrets/{Path(word).name}" for word in first["command"] if word.startswith("/given/")}
    assert {options.tls_cert, options.tls_key, options.users} == copied
    assert first["command"][:3] == ["install", "-m", "600"]
    assert spec["securityContext"]["runAsNonRoot"] is True


# ---------------------------------------------------------------------------------------- systemd


class Unit(configparser.RawConfigParser):
    """A unit, where a key may stand several times."""

    def __init__(self):
        super().__init__(strict=False, delimiters=["="], comment_prefixes=["#"], interpolation=None)

    def optionxform(self, optionstr):
        return optionstr


UNIT = DEPLOY / "systemd" / "planrt-worker@.service"
HARDENED = {
    "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
    "PrivateDevices": "yes", "DynamicUser": "yes", "RestrictNamespaces": "yes", "LockPersonality": "yes",
    "CapabilityBoundingSet": "", "SystemCallArchitectures": "native", "UMask": "0077",
}  # fmt: skip


def test_the_unit_is_hardened_and_its_command_parses():
    unit = Unit()
    unit.read_string(re.sub(r"\\\n\s*", "", UNIT.read_text()))
    service = unit["Service"]
    assert {name: service[name] for name in HARDENED} == HARDENED
    given = {"PLANRT_DATA": "--dataset digits"}
    for line in re.findall(r"(?m)^Environment=(.*)$", UNIT.read_text()):
        given |= dict(word.split("=", 1) for word in shlex.split(line))
    given |= {"CREDENTIALS_DIRECTORY": "/run/credentials/planrt-worker@alice.service"}
    for name, path in (("%t", "/run"), ("%S", "/var/lib"), ("%i", "alice")):
        service["ExecStart"] = service["ExecStart"].replace(name, path)
    words = shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda found: given[found[1]], service["ExecStart"]))
    assert words[0].endswith("/planrt")
    options = parsed(words[1:])
    assert (options.id, options.host, options.port, options.metrics_port) == ("alice", "0.0.0.0", 8777, 9100)
    assert (options.users, options.audit) == (
        "/run/planrt/alice/users.txt", "/var/lib/planrt/alice/audit.jsonl",
    )  # fmt: skip
    assert options.dataset == "digits"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    unit = tmp_path / "planrt-worker@.service"
    unit.write_text(UNIT.read_text().replace("/opt/planrt/bin/planrt", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]  # exposure of at most 2.0 of 10


# ---------------------------------------------------------------------------------------- Grafana

WORDS = {
    "sum", "by", "rate", "increase", "histogram_quantile", "avg_over_time", "time", "label_values", "le", "instance",
    "worker", "outcome", "reason", "direction", "kind", "job", "m", "planrt", "__rate_interval",
}  # fmt: skip


def queries(value):
    """Every query in the dashboard, variables included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "query") and isinstance(inner, str) and inner != "prometheus":
                yield inner
            else:
                yield from queries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from queries(inner)


def test_each_metric_and_label_that_the_dashboard_asks_for_is_told():
    dashboard = json.loads((DEPLOY / "grafana" / "planrt.json").read_text())
    job = WatchedJob()
    job.run = RunMetrics(["alice"], 1, waiting=dict, next_round=lambda: 1, checkpoints=lambda: (0, 0.0))
    with (
        VirtualWorker("alice", auto_add=False) as alice,
        planrt.MetricsServer(job, alice.watched) as server,
    ):
        alice.objects_count()
        alice.watched.certificate_until = 2e9  # as of a worker with TLS
        found = samples(server.address)
    labels = {}
    for name, pairs in found:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    asked = list(queries(dashboard))
    assert len(asked) > 30
    used = set()
    for query in asked:
        for name in re.findall(r"\b(?:planrt|process)_\w+", query):
            assert name in labels, f"{query}: there is no {name}"
            used.add(name)
            for label in re.findall(rf"{name}\{{(\w+)", query):
                assert label in labels[name] | {"instance", "job"}, f"{query}: {name} has no {label}"
        for by in re.findall(r"by \(([^)]*)\)", query):
            named = re.findall(r"\bplanrt_\w+", query)
            assert all(one.strip() in labels[named[0]] for one in by.split(",")), query
        bare = re.sub(r'"[^"]*"', "", query)
        rest = set(re.findall(r"[A-Za-z_]\w*", bare)) - WORDS - used
        assert not rest, f"{query}: {rest}"
    shown = {name for name in found.names() if name.startswith("planrt_")}
    told_otherwise = {"planrt_round_seconds_sum", "planrt_round_seconds_count"}
    assert shown - used <= told_otherwise | {name for name in shown if name.endswith("_created")}


def test_the_panels_of_the_dashboard_stand_side_by_side():
    dashboard = json.loads((DEPLOY / "grafana" / "planrt.json").read_text())
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
