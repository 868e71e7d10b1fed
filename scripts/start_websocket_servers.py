"""Starts the workers alice, bob, charlie and testing as processes of this machine.

They listen on ports 8777 to 8780, each with its part of MNIST (or of scikit-learn's digits), until Ctrl-C,
SIGTERM, or until one of them ends. None outlives this process. In the background of a shell script (``nohup ... &``)
Ctrl-C is ignored, as shells want it, and SIGTERM stops it. Exit codes: see `planrt.command_line`.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while all this is imported, Ctrl-C shows no traceback

import argparse
from collections.abc import Sequence

from planrt.command_line import Parser, leave, run_command, stopped_by, whole_number
from planrt.fl.data import digits as data
from planrt.fl.runs.children import WorkerProcesses, mnist_children
from planrt.fl.runs.serve_options import add_isolation, add_tls
from planrt.fl.serve import holdings
from planrt.workers.serving.metrics_options import MetricsOptions, add_metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="start_websocket_servers", description="Start four workers with their parts of MNIST."
    )
    port, threads = whole_number(at_least=1, at_most=65532), whole_number(at_least=1)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for all networks")
    add("--port", type=port, default=8777, help="port of alice (%(default)s); the next three are the others'")
    add("--data", metavar="DIR", help="folder that holds MNIST/raw")
    add("--dataset", choices=data.DATASETS, default="auto", help="which images to serve (%(default)s)")
    add("--threads", type=threads, help="torch threads of each worker (the cores are shared out)")
    add("--verbose", action="store_true", help="show the workers' logs, and tracebacks of errors")
    add("--users", metavar="FILE", help="the workers' users, as `planrt users add` writes them")
    add("--require-user", action="store_true", help="let nobody in who proves to be no user")
    add_tls(add)
    add_isolation(add)
    add_metrics(add, which=" for alice, and at the next three for the others")
    options = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: start(options), verbose=options.verbose)


def start(options: argparse.Namespace) -> None:
    """Starts the four, says what they hold, and waits; Ctrl-C and SIGTERM are how this command is meant to end."""
    MetricsOptions.of(options)  # refuses what cannot be, before anything is started
    source = data.find(options.dataset, options.data)  # found once, so that all four serve the same
    if source.notice:
        print(f"Notice: {source.notice}")
    children = mnist_children(
        source, first_port=options.port, threads=options.threads, verbose=options.verbose,
        first_metrics_port=options.metrics_port, more=_who(options),
    )  # fmt: skip
    workers = WorkerProcesses(children, host=options.host, die_with_us=True)
    try:
        workers.start()
        for worker in workers.wait_ready().values():
            print(holdings(worker.id, worker.key, worker.description, worker.images, worker.digits))
            print(f"  at {worker.uri}" + (f", metrics at {worker.metrics}/metrics" if worker.metrics else ""))
            about = worker.isolation
        if about:
            print(about)
        print(f"All four workers serve; {stopped_by()} stops them", flush=True)
        workers.wait()
    except KeyboardInterrupt:
        print("Interrupted: stopping the workers", flush=True)
    except SystemExit:  # of SIGTERM, see `run_command`
        print("Terminated: stopping the workers", flush=True)
    finally:
        workers.stop()
    print("All four workers are stopped", flush=True)


def _who(options: argparse.Namespace) -> list[str]:
    """What the workers are told of who may connect."""
    named = (
        "users", "tls_cert", "tls_key", "tls_client_ca", "tls_deny", "peer_ca", "peer_token_file", "metrics_host",
        "isolation",
    )  # fmt: skip
    given = [(name, getattr(options, name)) for name in named if getattr(options, name) is not None]
    flags = [
        f"--{name.replace('_', '-')}"
        for name in ("require_user", "insecure", "metrics_insecure")
        if getattr(options, name)
    ]
    flags += [f"--peers={peer}" for peer in options.peers or ()]
    return [*[f"--{name.replace('_', '-')}={value}" for name, value in given], *flags]


if __name__ == "__main__":
    leave(main())
