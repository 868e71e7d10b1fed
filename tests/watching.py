"""Reading what a worker or a run tells of itself, over HTTP and in logs."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families


def ask(address: str, path: str, *, method: str = "GET", **headers: str) -> tuple[int, str]:
    """(status, body); headers as ``host="x"``, ``sec_fetch_site="y"``."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="host" in headers)
        for name, value in named.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def health(address: str) -> tuple[int, dict]:
    status, body = ask(address, "/health")
    return status, json.loads(body)


class Samples(dict):
    """(name, frozenset of labels) -> value."""

    def of(self, name: str, **labels: str) -> float:
        return self[name, frozenset(labels.items())]

    def names(self) -> set[str]:
        return {name for name, _ in self}


def samples(address: str) -> Samples:
    """The metrics at an address, read by the library that Prometheus' users have."""
    status, body = ask(address, "/metrics")
    assert status == 200, body
    found = Samples()
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def whole_lines(path: Path) -> list[str]:
    """The lines of a log that somebody may be writing: without the last one, as long as it has no end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
