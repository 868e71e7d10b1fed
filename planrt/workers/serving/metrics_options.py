"""The options of a command that may be watched, read before torch loads; `metrics_end.py` beside it serves."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planrt.command_line import whole_number
from planrt.errors import OptionError
from planrt.extras import check_installed
from planrt.workers.transport.callers import is_loopback


def check_consent(host: str, *, insecure: bool) -> None:
    """Raises OptionError where other machines would read the metrics at `host`, and nobody wrote that they may."""
    if not (insecure or is_loopback(host)):
        raise OptionError(
            f"other machines reach {host or 'all addresses'}, and metrics are told to everybody there, without TLS: "
            "write --metrics-insecure (metrics_insecure=True) if that is meant"
        )


@dataclass(frozen=True, slots=True)
class MetricsOptions:
    """The options of a command, or a worker, that may be watched: `port` is None where it is not.

    Raises:
        OptionError: they contradict one another. MissingPackageError: prometheus-client is not installed.
    """

    port: int | None = None
    host: str | None = None
    insecure: bool = False
    hosts: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.port is None:
            if self.host is not None or self.insecure:
                raise OptionError("--metrics-host and --metrics-insecure are for --metrics-port: add that")
            return
        check_consent("127.0.0.1" if self.host is None else self.host, insecure=self.insecure)
        check_installed("prometheus_client", by="--metrics-port", extra="metrics")

    @classmethod
    def of(cls, options: argparse.Namespace) -> MetricsOptions:
        """Returns what a command line says (see `add_metrics`)."""
        hosts = getattr(options, "allow_host", ())
        return cls(options.metrics_port, options.metrics_host, options.metrics_insecure, hosts)


def add_metrics(add: Callable[..., Any], *, which: str = "") -> None:
    """Adds the options of `MetricsOptions`: `add` is a parser's `add_argument`; `which` says more of the port."""
    add(
        "--metrics-port",
        type=whole_number(at_least=0, at_most=65_535),
        metavar="PORT",
        help=f"serve /health and Prometheus' /metrics at this port{which}; 0 for a free one",
    )
    add("--metrics-host", metavar="HOST", help="address that the metrics are served at (127.0.0.1)")
    add(
        "--metrics-insecure",
        action="store_true",
        help="serve metrics on an address that other machines reach: to everybody there, without TLS",
    )
