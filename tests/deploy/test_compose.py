"""What deploy/compose.yaml starts, started without containers: the same words, variables and health checks.

Only what a container has for itself is replaced: its mounted files by those that they are mounted from, its network's
names and ports by loopback and free ports, and ``planrt`` by this Python's. The files are made by the commands of
deploy/README.md.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import blocks, commands
from tests.processes import PATIENCE, eventually
from tests.watching import health, samples

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PLANRT = [sys.executable, str(ROOT / "tests" / "patient.py"), "-m", "planrt"]


def free_ports(count: int) -> list[int]:
    """Different ports that nobody has now, nor gets meanwhile by asking for any: systems give those from 32768 on."""
    found: list[int] = []
    for port in random.sample(range(20_000, 28_000), 1_000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no ports are free")


class Federation:
    """The services of the file, on this machine."""

    def __init__(self, folder: Path, variables: dict[str, str]):
        self.folder, self.variables = folder, variables
        self.services = {
            name: service
            for name, service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].items()
            if service["image"].startswith("planrt")
        }
        ports = free_ports(2 * len(self.services))
        self.ports = dict(zip(self.services, zip(ports[::2], ports[1::2], strict=True), strict=True))
        self.processes: dict[str, subprocess.Popen] = {}

    def variable(self, found: re.Match) -> str:
        return self.variables.get(found[1], found[2] or "")

    def words(self, name: str, given: list[str]) -> list[str]:
        """A command of the service `name`, as it is here."""
        service, (port, metrics) = self.services[name], self.ports[name]
        mounts = dict(reversed(one.split(":")[:2]) for one in service["volumes"])
        words = []
        for before, word in zip(["", *given], given, strict=False):
            word = re.sub(r"\$\{(\w+)(?::-(.*?))?\}", self.variable, word)
            for target, source in mounts.items():
                if word == target or word.startswith(f"{target}/"):
                    word = f"{self.folder / source.removeprefix('./')}{word.removeprefix(target)}"
            word = {"--port": str(port), "--metrics-port": str(metrics)}.get(before, word)
            word = word.replace("0.0.0.0", "127.0.0.1").replace(":9100", f":{metrics}")
            for other, (their_port, _) in self.ports.items():
                word = word.replace(f"//{other}:8777", f"//127.0.0.1:{their_port}")
            words.append(word)
        return words

    def run(self, name: str, given: list[str], **options) -> subprocess.Popen:
        said = self.services[name].get("environment", {})
        command = [*PLANRT, *self.words(name, given)]
        out = (self.folder / f"{name}.log").open("ab")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            **{key: str(value) for key, value in said.items()},
        }
        try:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT, **options
            )
        finally:
            out.close()

    def start(self, name: str) -> None:
        self.processes[name] = self.run(name, self.services[name]["command"])

    def check(self, name: str) -> int:
        """Runs the service's health check; returns its exit code."""
        kind, program, *given = self.services[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "planrt")
        return self.run(name, given).wait(PATIENCE)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def metrics(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name][1]}"

    def healthy(self, name: str) -> bool:
        assert self.processes[name].poll() is None, self.log(name)
        with contextlib.suppress(OSError):
            return health(self.metrics(name))[0] == 200
        return False

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE)


@pytest.fixture
def federation(tmp_path):
    setup = next(block for block in blocks(DEPLOY / "README.md") if "certs make" in block.text)
    for command in commands(setup):
        words = shlex.split(command)
        command = words if words[0] != "planrt" else [*PLANRT, *words[1:]]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = Federation(tmp_path / "deploy", {"PLANRT_ROUNDS": "2"})
    (tmp_path / "deploy" / "runs").mkdir()
    yield found
    found.stop()


@pytest.mark.timeout(600)
def test_the_federation_of_the_compose_file_trains_two_rounds_and_is_well(federation):
    workers = [name for name in federation.services if name != "coordinator"]
    for name in workers:
        federation.start(name)
    for name in workers:
        # They start by themselves, all at once.
        well = eventually(lambda name=name: federation.healthy(name), 4 * PATIENCE)
        assert well, federation.log(name)
    assert federation.check("alice") == 0
    federation.start("coordinator")
    coordinator, seen = federation.processes["coordinator"], set()
    deadline = time.monotonic() + 2 * PATIENCE
    while coordinator.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            seen.add(health(federation.metrics("coordinator"))[0])
        time.sleep(0.05)
    assert coordinator.wait(PATIENCE) == 0, federation.log("coordinator")
    assert 200 in seen
    assert "after 2 rounds" in federation.log("coordinator")
    assert (federation.folder / "runs" / "digits" / "model.safetensors").is_file()
    for name in workers:
        found = samples(federation.metrics(name))
        kind = "evaluated" if name == "testing" else "fitted"
        assert found.of("planrt_worker_answers_total", worker=name, kind=kind) >= 1, name
        assert found.of("planrt_worker_up", worker=name) == 1
        assert found.of("planrt_worker_certificate_expiry_time_seconds", worker=name) > time.time()
    for name in workers:
        federation.processes[name].send_signal(signal.SIGTERM)  # as the file's stop_signal, the default
    for name in workers:
        assert federation.processes[name].wait(PATIENCE) == 0, federation.log(name)
    assert federation.check("alice") != 0  # nobody is there: the health check says so
