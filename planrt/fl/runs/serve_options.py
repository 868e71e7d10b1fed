"""The options of ``planrt serve``. Read before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

from planrt.command_line import Parser, seconds, tag, whole_number
from planrt.workers.serving.metrics_options import add_metrics


def parser(prog: str) -> Parser:
    """Returns the parser of the command's options."""
    parser = Parser(prog=prog, description="Serve one worker's data over a websocket.")
    port = whole_number(at_least=0, at_most=65535)
    add = parser.add_argument
    add("--id", required=True, help="the worker's name; alice, bob and charlie have their partitions")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for all networks")
    add("--port", type=port, default=8777, help="port to listen on (%(default)s); 0 for a free one")
    add("--testing", action="store_true", help="serve the test images")
    add("--empty", action="store_true", help="serve no data set: clients send what the worker is to hold")
    add("--verbose", action="store_true", help="log what happens, and show tracebacks of errors")
    add("--data", metavar="DIR", help="folder that holds MNIST/raw")
    add(
        "--dataset",
        default="auto",
        help="auto, mnist, digits, package.module:factory for your own, or a table in a .csv or .parquet file",
    )
    add(
        "--id-column",
        action="append",
        default=[],
        metavar="NAME",
        help="column of the table that says who a row is about (repeatable); it never leaves the worker",
    )
    add("--label-column", metavar="NAME", help="column of the table that is its label, if it has one")
    add("--key", help="key that clients ask for your own data set by")
    add("--tag", action="append", default=[], type=tag, help="tag of the data set (repeatable)")
    add("--threads", type=whole_number(at_least=1), help="torch threads (as many as cores)")
    add("--device", default="cpu", help="device that computes (%(default)s)")
    add(
        "--fast-kernels",
        action="store_true",
        help="on a GPU: take the fastest kernels, though results then need not repeat bit for bit",
    )
    add("--users", metavar="FILE", help="the worker's users, as `planrt users add` writes them")
    add("--access", metavar="FILE", help="which user may do what with which data (TOML); see docs/connect.md")
    add("--audit", metavar="FILE", help="keep a log of what clients do there, for `planrt audit`")
    add(
        "--audit-size",
        metavar="BYTES",
        help='size of a file of that log, about, before the next one is begun, as "64 MiB" (256 MiB)',
    )
    add(
        "--joint-runs",
        metavar="DIR",
        help="folder where the worker keeps its part of joint runs (vertical learning), to go on after a break",
    )
    add(
        "--sum-key",
        metavar="FILE",
        help="key to sign with in secure aggregations (planrt sum-keys make NAME)",
    )
    add(
        "--sum-peers",
        metavar="FILE",
        help="workers with their keys, a line `name: key` each: take part in secure aggregations with these alone, and "
        "only where they sign",
    )
    add("--require-user", action="store_true", help="let nobody in who proves to be no user")
    add_tls(add)
    add("--policy", metavar="FILE", help="what may run here (TOML); see examples/hospital_policy.toml")
    add(
        "--approvals",
        "--folder",  # as other commands called it before
        metavar="DIR",
        help="folder where plans wait, and decisions are kept, for `planrt approve`",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web page that may connect, such as https://dashboard.example (repeatable); others are refused",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which clients may address this worker, besides its IP addresses (repeatable)",
    )
    add(
        "--max-session-memory",
        metavar="BYTES",
        help='memory that the sessions of one user may keep, as "512 MiB" (no limit but the policy\'s)',
    )
    add(
        "--max-session-objects",
        type=whole_number(at_least=1),
        metavar="N",
        help="objects that the sessions of one user may keep (no limit but the policy's)",
    )
    add(
        "--max-worker-memory",
        metavar="BYTES",
        help='memory that all users may keep together, as "16 GiB" (no limit but the policy\'s)',
    )
    add(
        "--max-worker-objects",
        type=whole_number(at_least=1),
        metavar="N",
        help="objects that all users may keep together (no limit but the policy's)",
    )
    add(
        "--keep-sessions",
        type=seconds(or_none=True),
        metavar="SECONDS",
        help="for how long a client that lost its connection may come back to its objects (120); 0 for not at all",
    )
    add_waiting(add)
    add_metrics(add)
    add_isolation(add)
    add(
        "--kernel-timeout",
        type=seconds(),
        metavar="SECONDS",
        help="with --isolation: seconds that one op may take before its process is ended (600)",
    )
    add(
        "--process-memory",
        metavar="BYTES",
        help='with --isolation: memory that one process may take beside what all share, as "4 GiB" (no limit)',
    )
    add(
        "--readable",
        action="append",
        default=[],
        metavar="PATH",
        help="with --isolation: file or folder that the data set reads while it is served (repeatable; none)",
    )
    add("--json-logs", action="store_true", help="log JSON lines")
    # For processes started by `planrt.fl.runs.children`: say so in JSON on stdout, and end with the parent.
    add("--supervised", action="store_true", help=argparse.SUPPRESS)
    # The process that this one must not outlive, be it stopped.
    add("--parent", type=whole_number(at_least=1), help=argparse.SUPPRESS)
    # A data set that `planrt.fl.local` put into a file.
    add("--saved", action="append", default=[], help=argparse.SUPPRESS)
    return parser


WAITING: Final = (
    ("arriving-memory", "BYTES", "larger messages of one user, or of one address of those who are none, while they "
     "arrive; no message is longer (as much as the user may keep, 16 GiB without a limit)"),
    ("worker-arriving-memory", "BYTES", "larger messages of all clients together while they arrive (64 GiB)"),
    ("unread-answers", "N", "answers that wait for a client which does not read; with more it is cut off (1,024)"),
    ("unread-memory", "BYTES", "these answers, the newest one left out (4 GiB)"),
    ("unsent-messages", "N", "messages that wait for another worker which does not read; with more that connection "
     "ends (10,000)"),
    ("unsent-memory", "BYTES", "these messages, the newest one left out (4 GiB)"),
    ("round-plans", "N", "plans that are kept of those that rounds send; one that has gone is sent again (256)"),
    ("round-plan-memory", "BYTES", "files of these plans; none is longer, nor than 64 MiB (64 MiB)"),
)  # fmt: skip
"""Limits of what waits or arrives, as options: name without ``--max-``, what it counts, of what."""


def add_waiting(add: Callable[..., Any]) -> None:
    """Adds the options of `WAITING`: `add` is a parser's `add_argument`."""
    for name, counts, of in WAITING:
        whole = {"type": whole_number(at_least=1)} if counts == "N" else {}
        what = "memory of " if counts == "BYTES" else ""
        add(f"--max-{name}", metavar=counts, help=what + of, **whole)


def add_isolation(add: Callable[..., Any]) -> None:
    """Adds the option whether there is isolation: `add` is a parser's `add_argument`."""
    add(
        "--isolation",
        choices=("auto", "on", "off"),
        default="auto",
        help="run the work of each user in a process of its own, which can do nothing but compute (auto: on with users "
        "or a policy, off without)",
    )


def add_tls(add: Callable[..., Any]) -> None:
    """Adds the options of what a worker shows and asks of its clients: `add` is a parser's `add_argument`."""
    add("--tls-cert", metavar="FILE", help="certificate (PEM): serve wss:// (planrt certs makes one)")
    add("--tls-key", metavar="FILE", help="its private key (PEM)")
    add(
        "--tls-client-ca",
        metavar="FILE",
        help="authorities (PEM): only clients with a certificate of one of these get in, as the user that it names",
    )
    add(
        "--tls-deny",
        metavar="FILE",
        help="SHA-256 fingerprints of clients' certificates that get in no longer",
    )
    add(
        "--peers",
        action="append",
        metavar="HOST:PORT",
        help="worker that this one may dial for its clients, HOST:* for all ports (repeatable; default: those of this "
        "machine); none for none",
    )
    add("--peer-ca", metavar="FILE", help="authorities (PEM) that these workers' certificates are of")
    add("--peer-token-file", metavar="FILE", help="the token of the user that this worker is at these")
    add(
        "--insecure",
        action="store_true",
        help="listen on an address that other machines reach without TLS, or without users",
    )
