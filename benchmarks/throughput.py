"""Throughput: a model of 25 million parameters to three workers and back, against bare sockets."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.measure import Goal, Row, Sample, in_turns
from benchmarks.rounds import Rounds, websocket_workers
from benchmarks.sockets import BareSockets
from benchmarks.workloads import Size, model_bytes, set_width, wide_children, wide_config, wide_model

WORKERS = 3
WIDTH = 5000


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    set_width(100 if size.quick else WIDTH)
    with ExitStack() as stack:
        workers = stack.enter_context(websocket_workers(wide_children(WORKERS)))
        model = wide_model()
        nbytes = model_bytes(model)
        rounds = Rounds(workers, wide_config(model), dataset_key="wide")
        sockets = stack.enter_context(BareSockets(WORKERS))
        seconds = in_turns(
            {
                "ours": rounds.run,
                "one socket": lambda: sockets.round_trip(nbytes, 1),
                "three sockets": lambda: sockets.round_trip(nbytes, WORKERS),
            },
            repeats=size.repeats,
        )

    def megabytes_a_second(name: str, connections: int) -> Sample:
        return seconds[name].map(lambda duration: 2 * connections * nbytes / 1e6 / duration)

    note = f"{nbytes / 1e6:.0f} MB to three workers and back in {seconds['ours'].median:.2f} s, zero batches"
    ours = megabytes_a_second("ours", WORKERS)
    one, three = megabytes_a_second("one socket", 1), megabytes_a_second("three sockets", WORKERS)
    return [
        Row("throughput", "MB/s", ours, one, "one TCP socket", Goal(at_least=1 / 3), note),
        Row("throughput", "MB/s", ours, three, "three TCP sockets at once"),
    ]
