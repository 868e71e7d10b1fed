"""One worker by hand: ``planrt serve --id alice --port 8777``, or ``python -m planrt.fl.serve ...``.

Serves a partition of MNIST (or the digits), the test images, or the owner's own data set, until Ctrl-C or
SIGTERM, which end it with exit code 0. Options and data are checked before torch is imported, so that
mistakes show at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from planrt.command_line import leave, one_line, run_command, stopped_by
from planrt.errors import DataError, OptionError
from planrt.fl.data import digits as data
from planrt.fl.runs.serve_options import WAITING, parser
from planrt.stopping import die_with, ending_at_once
from planrt.workers.serving import users_file
from planrt.workers.serving.isolation.options import WAITS_FOR_PARENT, can_isolate
from planrt.workers.serving.metrics_options import MetricsOptions
from planrt.workers.transport.addresses import scheme_of

if TYPE_CHECKING:
    from planrt.plans.policy.rules import Policy
    from planrt.serde.frames import Limits

STOP_GRACE = 1.5
"""Seconds a worker whose parent is gone may take to stop in order."""


@dataclass(frozen=True)
class Served:
    """A data set, or None, and how it is announced; `digits` counts images per digit where that makes
    sense."""

    dataset: Any
    key: str
    tags: tuple[str, ...]
    description: str
    digits: dict[int, int]
    notice: str = ""


def main(
    arguments: Sequence[str] | None = None, *, prog: str = "planrt.fl.serve", alone: bool = False
) -> int:
    """Runs the command; returns its exit code. `prog` is what it was called by.

    `alone`: the process is there for nothing else, and may be started again, with a malloc that clears
    memory.
    """
    options = parser(prog).parse_args(arguments)
    if alone and (options.users is not None or options.policy is not None):
        from planrt.allocator import begin_clearing

        begin_clearing()
    if options.parent is not None:
        die_with(options.parent)
    status = _supervised_status() if options.supervised else None
    return run_command(
        f"worker {options.id}", lambda: serve(options, status, alone=alone), verbose=options.verbose
    )


def serve(options: argparse.Namespace, status: TextIO | None = None, *, alone: bool = False) -> None:
    """Loads the data and serves it until stopped. `alone`: as for `main`.

    With `status`, whoever started this process gets one JSON line there, ``{"port": ...}`` or
    ``{"error": "..."}``, instead of the text meant for people.
    """
    try:
        MetricsOptions.of(options)  # refuses what cannot be
        isolated, about_isolation = _is_isolated(options, alone=alone)
        # What is imported and loaded may take long, and there is nothing yet that could be lost.
        with ending_at_once():
            from planrt.logs import configure
            from planrt.workers.websocket_server import WebsocketServerWorker

        policy = _policy(options)
        configure(verbose=options.verbose, json=options.json_logs)
        worker = WebsocketServerWorker(
            id=options.id,
            host=options.host,
            port=options.port,
            threads=options.threads,
            device=options.device,
            deterministic=False if options.fast_kernels else None,
            users=options.users,
            require_user=options.require_user,
            cert_path=options.tls_cert,
            key_path=options.tls_key,
            client_ca=options.tls_client_ca,
            deny=options.tls_deny,
            insecure=options.insecure,
            peers=options.peers if options.peers != ["none"] else [],
            peer_ca=options.peer_ca,
            peer_token=Path(options.peer_token_file) if options.peer_token_file else "",
            policy=policy,
            approvals=options.approvals,
            access=options.access,
            audit=options.audit,
            **_audit(options),
            joint_runs=options.joint_runs,
            sum_key=options.sum_key,
            sum_peers=options.sum_peers,
            origins=options.allow_origin,
            hosts=options.allow_host,
            max_session_memory=_bytes_of("--max-session-memory", options.max_session_memory),
            max_session_objects=options.max_session_objects,
            max_worker_memory=_bytes_of("--max-worker-memory", options.max_worker_memory),
            max_worker_objects=options.max_worker_objects,
            isolation=isolated,
            **_isolation(options, isolated=isolated),
            limits=_limits(options),
            metrics_port=options.metrics_port,
            metrics_host=options.metrics_host,
            metrics_insecure=options.metrics_insecure,
        )
        with ending_at_once():  # after all options are known to be right: data may have to be fetched
            served = _served(options) if not options.empty else _nothing(options)
        if served.dataset is not None:
            worker.add_dataset(
                served.dataset, served.key, tags=list(served.tags), description=served.description
            )
        for path in options.saved:
            worker.add_dataset(*_from_file(path))

        def ready(port: int) -> None:
            _notice_tokens(options.users)
            items = 0 if served.dataset is None else len(served.dataset)
            if status is not None:
                report = {"port": port, "key": served.key, "description": served.description}
                report |= {"secure": options.tls_cert is not None, "metrics": worker.metrics_address}
                report["isolation"] = about_isolation
                _send(status, report | {"images": items, "digits": served.digits})
                return
            if served.notice:
                print(f"Notice: {served.notice}")
            if served.dataset is None:
                print(f"{options.id} holds no data set: clients send it what it needs")
            else:
                print(holdings(options.id, served.key, served.description, items, served.digits))
            if policy is not None:
                print(_about(policy, options.approvals))
            if about_isolation:
                print(about_isolation)
            if worker.metrics_address:
                print(f"Metrics at {worker.metrics_address}/metrics")
            address = f"{scheme_of(worker.address)}://{options.host}:{port}"
            print(f"Worker {options.id} serves at {address}; {stopped_by()} stops it", flush=True)

        worker.start(ready=ready)
    except Exception as error:
        if status is not None:
            _send(status, {"error": one_line(error)})
            if not options.verbose:
                raise SystemExit(1) from None  # the parent tells the user; one message is enough
        raise


def holdings(worker_id: str, key: str, description: str, items: int, digits: dict[int, int]) -> str:
    """Returns the lines that tell an owner what a worker holds."""
    lines = [f"{worker_id} holds {key!r}: {description}, {items:,} items"]
    lines += [f"  {digit}: {count:>6,} images" for digit, count in digits.items()]
    return "\n".join(lines)


def _served(options: argparse.Namespace) -> Served:
    if options.dataset.lower().endswith((".csv", ".parquet")):
        return _table(options)
    if options.id_column or options.label_column is not None:
        raise OptionError("--id-column and --label-column are of a table: give it with --dataset table.csv")
    if ":" in options.dataset:
        return _own(options)
    if options.key is not None:
        raise OptionError("--key names your own data set: give it with --dataset package.module:factory")
    if options.dataset not in data.DATASETS:
        raise OptionError(
            f"--dataset {options.dataset}: use {', '.join(data.DATASETS)}, or package.module:factory"
        )
    testing = options.testing or options.id == data.TESTING
    if not testing and options.id not in data.PARTITIONS:
        raise DataError(data.no_partition(options.id))
    loaded = data.load(options.dataset, options.data)
    dataset = data.partition_for(options.id, loaded, testing=testing)
    title = "MNIST" if loaded.name == "mnist" else "scikit-learn's digits"
    digits = data.digit_counts(dataset.targets.numpy())
    return Served(
        dataset=dataset,
        key=data.TEST_KEY if testing else data.TRAIN_KEY,
        tags=(f"#{loaded.name}", *options.tag),
        description=f"{title}, {'test' if testing else 'training'} images of {min(digits)}-{max(digits)}",
        digits=digits,
        notice=loaded.notice,
    )


def _nothing(options: argparse.Namespace) -> Served:
    """No data set, for a worker that gets its data from clients."""
    if options.testing or options.data is not None or options.key is not None or options.tag:
        raise OptionError("--empty serves no data set: leave out --testing, --data, --key and --tag")
    if options.dataset != "auto" or options.id_column or options.label_column is not None:
        raise OptionError("--empty serves no data set: leave out --dataset, --id-column and --label-column")
    return Served(None, "", (), "", {})


def _own(options: argparse.Namespace) -> Served:
    """The data set that the owner's factory makes. Their command line, their code: importing it is fine."""
    if options.testing or options.data is not None:
        raise OptionError("--testing and --data are for MNIST: leave them out with a data set of your own")
    if not options.key:
        raise OptionError("your own data set needs a key that clients ask for it by: add --key KEY")
    module_name, _, factory_name = options.dataset.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        dataset = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:  # whatever their code raises
        what = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"--dataset {options.dataset} does not give a data set ({what})") from error
    return Served(dataset, options.key, tuple(options.tag), options.dataset, {})


def _table(options: argparse.Namespace) -> Served:
    """A table in a file of the owner's, for joint runs with other owners."""
    if options.testing or options.data is not None:
        raise OptionError("--testing and --data are for MNIST: leave them out with a table")
    if not options.id_column:
        raise OptionError("a table needs a column that says who a row is about: add --id-column NAME")
    from planrt.sharing.columns.table import Table

    table = Table.from_file(options.dataset, options.id_column, label=options.label_column)
    key = options.key or Path(options.dataset).stem
    about = f"table of {', '.join(table.columns)}"
    return Served(table, key, tuple(options.tag), about, {})


def _from_file(path: str) -> tuple[Any, str]:
    """A data set and its key."""
    from safetensors import safe_open

    from planrt.workers.datasets import BaseDataset

    with safe_open(path, framework="pt") as file:
        return BaseDataset(file.get_tensor("data"), file.get_tensor("targets")), file.metadata()["key"]


def _notice_tokens(path: str | None) -> None:
    """Says so where a file of users holds tokens. A file, as command lines can be seen by others."""
    found = None if path is None else users_file.read(path)
    if found is not None and found.in_clear:
        print(
            f"Notice: {path} holds tokens ({', '.join(found.in_clear)}): `planrt users convert --users {path}` keeps "
            "what checks them instead",
            file=sys.stderr,
        )


def _is_isolated(options: argparse.Namespace, *, alone: bool) -> tuple[bool, str]:
    """Whether the work of each user is to run in a process of its own, and a line that says so, where that was not
    said by the owner."""
    who = [
        what
        for what, given in (
            ("users", options.users is not None or options.tls_client_ca is not None),
            ("a policy", options.policy is not None),
        )
        if given
    ]
    if options.isolation != "auto":
        return options.isolation == "on", ""
    if not who:
        return False, ""
    whats = " and ".join(who)
    if not alone:
        why = "this process is there for other things as well"
    elif not options.device.startswith("cpu"):
        why = f"it is for the CPU, and this worker computes on {options.device}"
    elif options.sum_key is not None:
        why = "its processes would have the key to sign with (--sum-key)"
    elif not can_isolate():
        why = "this system has no way to confine a process"
    else:
        return True, f"Isolation: on, with {whats}; each user's work runs in a process of its own"
    return False, f"Isolation: off, though the worker has {whats}: {why}"


def _isolation(options: argparse.Namespace, *, isolated: bool) -> dict[str, Any]:
    """What is said of isolation beside that it is on."""
    said: dict[str, Any] = {}
    if options.kernel_timeout is not None:
        said["kernel_timeout"] = options.kernel_timeout
    if options.process_memory is not None:
        said["process_memory"] = _bytes_of("--process-memory", options.process_memory)
    if options.readable:
        said["readable"] = options.readable
    if said and not isolated:
        names = ", ".join("--" + name.replace("_", "-") for name in said)
        raise OptionError(f"{names}: only with isolation, so add --isolation on")
    return said


def _audit(options: argparse.Namespace) -> dict[str, Any]:
    """What is said of the audit log beside where it is."""
    if options.audit_size is None:
        return {}
    if options.audit is None:
        raise OptionError("--audit-size is of a log: add --audit FILE")
    return {"audit_size": _bytes_of("--audit-size", options.audit_size) or 0}


def _bytes_of(option: str, text: str | None) -> int | None:
    """The bytes that an option says."""
    from planrt.plans.policy.rules import read_bytes

    if text is None:
        return None
    plain = text.strip()
    nbytes = read_bytes(option, f"{plain} B" if plain.isdecimal() else text)
    if nbytes is None or nbytes < 1:
        raise OptionError(f'{option} must be at least 1 byte, as "512 MiB": got {text!r}')
    return int(nbytes)


def _limits(options: argparse.Namespace) -> Limits:
    """What is said of what waits or arrives, and of sessions that are kept."""
    from planrt.serde.frames import Limits

    said: dict[str, Any] = {}
    for name, counts, _ in WAITING:
        field = name.replace("-", "_")
        value = getattr(options, f"max_{field}")
        if value is not None:
            said[field] = _bytes_of(f"--max-{name}", value) if counts == "BYTES" else value
    if options.keep_sessions is not None:
        said["session_seconds"] = options.keep_sessions
    return Limits(**said)


def _policy(options: argparse.Namespace) -> Policy | None:
    from planrt.plans.policy.rules import Policy

    if options.policy is None:
        if options.approvals is not None:
            raise OptionError("--approvals is for workers with a policy: add --policy FILE")
        return None
    policy = Policy.from_file(options.policy)
    if policy.approval == "ask" and options.approvals is None:
        raise OptionError(
            'the policy says approval = "ask": add --approvals DIR, the folder where plans wait for you'
        )
    return policy


def _about(policy: Policy, approvals: str | None) -> str:
    said = {
        "open": "any plan within the rules runs",
        "list": f"{len(policy.approved)} plans of the list run",
        "ask": f"plans wait in {approvals} until you approve them: planrt pending --approvals {approvals}",
    }[policy.approval]
    return f"Policy {policy.version}: {said}"


def _send(status: TextIO, message: dict[str, Any]) -> None:
    status.write(json.dumps(message) + "\n")
    status.flush()


def _supervised_status() -> TextIO:
    """Ties this process to its parent, and returns the stream for the status line.

    The parent holds the other end of our stdin and never writes: end of file means that it is gone, however
    it went (SIGKILL included). Anything else printed to stdout goes to stderr, to keep the status line whole.
    """
    threading.Thread(target=_end_with_parent, name=WAITS_FOR_PARENT, daemon=True).start()
    status = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return status


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_GRACE)
    os._exit(1)


if __name__ == "__main__":
    leave(main(alone=True))
