"""The main job: ``planrt run --rounds 40`` trains the MNIST network on workers.

``python -m planrt.fl.mnist_async`` is the same command. Three workers train on digits 0-3, 4-6 and 7-9, their
models are averaged every round, and a fourth, called testing, evaluates. Workers that already run are used
(`--worker`, or ports 8777-8780); otherwise four processes are started and stopped again. The run is written down in
its folder, and ``--resume`` goes on with one that was killed, interrupted or failed. Exit codes: see
`planrt.command_line`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import platform
import shlex
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planrt.command_line import leave, one_line, run_command
from planrt.errors import OptionError, RemoteError, RunFolderError, TransportError
from planrt.extras import check_installed, needed
from planrt.fl.data import digits as data
from planrt.fl.report import FEDERATED, Evaluation, Report, Round, plot
from planrt.fl.runs.children import ChildOptions, WorkerProcesses, mnist_children
from planrt.fl.runs.discovery import (
    connect,
    dataset_of,
    given_addresses,
    running_addresses,
)
from planrt.fl.runs.identity import Identity
from planrt.fl.runs.job_folder import check_room, job_folder
from planrt.fl.runs.job_options import by_option_name, parsed, parser, resumed
from planrt.fl.runs.run_folder import OPTIONS, RunFolder
from planrt.serde.disk import Disk
from planrt.stopping import ending_at_once, run_until_stopped, said, signalled
from planrt.workers.serving.metrics_options import MetricsOptions

if TYPE_CHECKING:
    import torch

    from planrt.fl.config import TrainConfig
    from planrt.fl.evaluator import ModelEvaluator
    from planrt.fl.rounds import RoundResult, RoundScheduler
    from planrt.plans.training import EvaluationResult

__all__ = ["Progress", "main", "parser", "run"]

EVALUATE_EVERY = 10
LR_DECAY = 0.98
LR_FLOOR = 0.01  # of the initial learning rate
TELL_AFTER = 30.0
"""Seconds of waiting in one round after which a line says for whom."""

DIGIT_GROUPS = ((0, 3), (4, 6), (7, 9))


def main(arguments: Sequence[str] | None = None, *, prog: str = "mnist_async") -> int:
    """Runs the command; returns its exit code. `prog` is what it was called by."""
    options, chosen = parsed(arguments, prog)
    return run_command(prog, lambda: run(resumed(options, chosen)), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains, evaluates, writes the run folder and says what came out.

    Raises:
        MissingPackageError: a package is not installed that the extra ``run`` brings. Nothing was started.
    """
    began = time.perf_counter()
    check_installed("tqdm", "matplotlib", by="this run")
    _check_together(options)
    progress, metrics = Progress(), MetricsOptions.of(options)
    with job_folder(options) as folder:
        identity = Identity.of(options)
        addresses = given_addresses(options.worker) if options.worker else running_addresses(identity)
        with contextlib.ExitStack() as stack:
            children = None
            if addresses is None:
                children = stack.enter_context(WorkerProcesses(_children(options), die_with_us=True))
            elif options.data is not None or options.device != "cpu" or options.fast_kernels:
                print(
                    "Notice: --data, --device and --fast-kernels do nothing here: the workers that run hold data and "
                    "device"
                )
            # Only now, so that this process imports torch at the same time as its children.
            with ending_at_once():
                import torch

                from planrt.fl.runs.networks import seeded_net
                from planrt.logs import configure

            configure(verbose=options.verbose)
            torch.set_num_threads(1)  # averaging is light, and the workers on this machine need the cores
            network = seeded_net(options.seed)
            if children is not None:
                addresses = {worker.id: worker.uri for worker in children.wait_ready().values()}
                identity = Identity()  # they have no users
            try:
                run_until_stopped(
                    _train(options, addresses or {}, identity, network, began, folder, progress, metrics)
                )
            except BaseException as error:
                _write_stopped(options, folder, progress, error)
                raise
        report = progress.report
        assert report is not None  # noqa: S101 - it has trained
        assert progress.state is not None  # noqa: S101
        _write(options, folder, report, progress.state)
    _print_summary(options, folder, report, time.perf_counter() - began)


def _check_together(options: argparse.Namespace) -> None:
    """Checks the options that say something of each other, before anything is connected to or started.

    Raises:
        OptionError: more workers are needed than there are, or two options exclude each other.
    """
    workers, needed = len(data.PARTITIONS), options.min_workers
    if options.worker:
        workers = len(given_addresses(options.worker)) - 1  # one of them evaluates
    if needed is not None and needed > workers:
        raise OptionError(f"--min-workers {needed}: workers to train on there are {workers}")
    if options.secure_aggregation:
        for option, given in (
            ("--aggregation", options.aggregation != "mean"),
            ("--max-update-norm", options.max_update_norm is not None),
        ):
            if given:
                raise OptionError(
                    f"{option} needs the update of each worker, and with --secure-aggregation nobody sees a single "
                    "one: leave one of the two out"
                )
        from planrt.sharing.secure_sum.group import check_threshold, default_threshold

        check_threshold(workers, needed or default_threshold(workers))
    if options.aggregation != "mean":
        with ending_at_once():  # it needs torch
            from planrt.fl.robust import aggregation_called
        fewest = getattr(aggregation_called(options.aggregation), "fewest", 1)
        if fewest > (counted := workers if needed is None else needed):
            raise OptionError(
                f"--aggregation {options.aggregation} needs at least {fewest} workers in a round, and there "
                f"are {workers}"
                + ("" if needed is None else f", of which {counted} are enough: --min-workers")
            )


@dataclass
class Progress:
    """The place that a run has come to, for who writes down what was done when it ends early."""

    report: Report | None = None
    state: Mapping[str, torch.Tensor] | None = None


async def _train(
    options: argparse.Namespace,
    addresses: Mapping[str, str],
    identity: Identity,
    network: torch.nn.Module,
    began: float,
    folder: Path,
    progress: Progress,
    metrics: MetricsOptions,
) -> None:
    import torch.nn.functional as F

    from planrt.fl.config import TrainConfig
    from planrt.fl.evaluator import ModelEvaluator
    from planrt.fl.runs.run_metrics import WatchedJob
    from planrt.workers.serving.metrics_end import serving

    async with contextlib.AsyncExitStack() as stack:
        job = WatchedJob()
        if address := await stack.enter_async_context(serving(metrics, job)):
            print(f"Metrics at {address}/metrics", flush=True)
        stack.callback(job.stop)
        workers = await connect(addresses, stack, identity, needed=options.min_workers)
        report = Report(
            dataset_of(workers, options.dataset), options.seed, by_option_name(options), _versions()
        )
        testing = workers.pop(data.TESTING)
        config = TrainConfig(
            network,
            F.nll_loss,
            batch_size=options.batch_size,
            optimizer="SGD",
            optimizer_args={"lr": options.lr},
            max_nr_batches=options.federate_after_n_batches,
        )
        scheduler = _scheduler(options, list(workers.values()), config, folder)
        stack.push_async_callback(scheduler.close)
        job.run = scheduler.watched
        evaluator = ModelEvaluator(
            testing, config, dataset_key=data.TEST_KEY, batch_size=options.test_batch_size
        )
        size = sum(value.nbytes for value in network.state_dict().values())
        await asyncio.to_thread(check_room, options, folder, size)  # before the first checkpoint is written
        await scheduler.prepare()
        await evaluator.prepare()
        state = scheduler.state
        Disk().write_whole(folder / OPTIONS, [json.dumps(by_option_name(options)).encode()])
        report.rounds = [_round_in(line) for line in scheduler.history()]
        progress.report, progress.state = report, state
        stack.push(lambda _kind, error, _trace: _write_stopped(options, folder, progress, error))
        goes_on = f", from round {scheduler.next_round}" if options.resume else ""
        print(
            f"Training on {', '.join(workers)}; ready after {time.perf_counter() - began:.1f} s{goes_on}",
            flush=True,
        )

        lr = options.lr
        # The bar shows on terminals and in notebooks only; what is printed goes above it.
        with _bars()(total=options.rounds, unit="round", mininterval=0, disable=None, leave=False) as bar:
            for number in range(1, options.rounds + 1):
                round_lr, lr = lr, max(LR_DECAY * lr, LR_FLOOR * options.lr)
                if number < scheduler.next_round:
                    bar.update()
                    continue
                evaluating = number % EVALUATE_EVERY == 1 or number == options.rounds
                async with _telling(scheduler, bar):
                    result = await scheduler.run_round(
                        number,
                        state,
                        lr=round_lr,
                        keep_worker_states=evaluating and not options.secure_aggregation,
                        save=False,
                    )
                state = result.state
                bar.update()
                title = f"Training round {number}/{options.rounds}"
                _say(f"{title}: loss {result.loss:.4f}, {result.seconds:.2f} s{_without(result)}")
                evaluations: dict[str, Evaluation] = {}
                started = time.perf_counter()
                if evaluating:
                    _say("Evaluating models")
                    models = [*result.worker_states.items(), (FEDERATED, state)]
                    evaluations = await _evaluations(evaluator, models, scheduler.round_timeout)
                seconds = time.perf_counter() - started
                report.rounds.append(
                    Round(number, result.seconds, result.workers, seconds, evaluations, result.missing)
                )
                progress.state = state
                await scheduler.save(
                    evaluation_seconds=seconds,
                    evaluation={name: asdict(one) for name, one in evaluations.items()},
                )
        await scheduler.settled()


def _scheduler(
    options: argparse.Namespace, workers: list[Any], config: TrainConfig, folder: Path
) -> RoundScheduler:
    """The scheduler of a run that begins, or goes on."""
    from planrt.fl.robust import aggregation_called
    from planrt.fl.rounds import RoundScheduler

    aggregation, secure = aggregation_called(options.aggregation), options.secure_aggregation
    changeable = {"min_workers": options.min_workers, "checkpoint_every": options.checkpoint_every}
    if options.round_timeout is not None:
        changeable["round_timeout"] = options.round_timeout
    if options.resume:
        return RoundScheduler.resume(
            folder, workers, config, aggregation=aggregation, secure_aggregation=secure, **changeable
        )
    return RoundScheduler(
        workers, config, dataset_key=data.TRAIN_KEY, seed=options.seed, aggregation=aggregation,
        secure_aggregation=secure, max_update_norm=options.max_update_norm, run_dir=folder, **changeable,
    )  # fmt: skip


def _without(result: RoundResult) -> str:
    """Who does not count in a round, for its line."""
    named = ", ".join(f"{id} ({' '.join(str(why).split())})" for id, why in result.missing.items())
    return f", without {named}" if named else ""


async def _evaluations(
    evaluator: ModelEvaluator, models: Sequence[tuple[str, Any]], timeout: float | None
) -> dict[str, Evaluation]:
    """Evaluates the models, as far as the testing worker answers: a run goes on without it."""
    found: dict[str, Evaluation] = {}
    try:
        async with asyncio.timeout(timeout):
            if evaluator.worker.workplace.closed:
                await evaluator.worker.async_reconnect()  # type: ignore[attr-defined]
            for name, model in models:
                found[name] = _evaluated(name, await evaluator.evaluate(model))
    except (TransportError, RemoteError) as error:
        _say(f"  no evaluation: {one_line(error)}")
    except TimeoutError:
        _say(f"  no evaluation: {evaluator.worker.id} did not answer in time")
    return found


@contextlib.asynccontextmanager
async def _telling(scheduler: RoundScheduler, bar: Any) -> AsyncIterator[None]:
    """Says who is waited for while a round runs: on the bar, and in a line where it takes long."""

    async def tell() -> None:
        said = False
        while True:
            await asyncio.sleep(0.5)
            waiting = scheduler.waiting
            if not waiting:
                continue
            text = f"waits for {', '.join(waiting)} since {max(waiting.values()):.0f} s"
            if scheduler.round_timeout is not None:
                text += f", for at most {scheduler.round_timeout:g} s"
            bar.set_postfix_str(text)
            if max(waiting.values()) > TELL_AFTER and not said:
                said = True
                _say(f"  {text}")

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()
        bar.set_postfix_str("")


def _round_in(line: Mapping[str, Any]) -> Round:
    """A round of the report, from a line of the journal."""
    from planrt.fl.round_result import known, parts_in

    parts, missing = parts_in(line)
    evaluations = {
        name: Evaluation(**{**one, "loss": known(one["loss"])})
        for name, one in line.get("evaluation", {}).items()
    }
    return Round(
        line["round"], line["seconds"], parts, line.get("evaluation_seconds", 0.0), evaluations, missing
    )


def _write_stopped(
    options: argparse.Namespace, folder: Path, progress: Progress, error: BaseException | None
) -> None:
    """Writes the report of what was done until a run was stopped, and says how to go on; once, and before connections
    are closed, which may take longer than there is time."""
    report = progress.report
    if report is None or report.stopped or error is None:
        return
    number = signalled()
    report.stopped = one_line(error) if number is None else said(number)
    path = Path(options.report or folder / "report.json")
    with contextlib.suppress(OSError):  # the error is what counts
        Disk().write_whole(path, [report.to_json().encode()])
    print(
        f"\nStopped after {len(report.rounds)} of {options.rounds} rounds\n"
        f"  report:  {path}\n"
        f"  go on:   planrt run --resume {shlex.quote(str(folder))}",
        flush=True,
    )


def _children(options: argparse.Namespace) -> list[ChildOptions]:
    source = data.find(options.dataset, options.data)  # found once, so that all four serve the same
    if source.notice:
        print(f"Notice: {source.notice}")
    print("No workers are running: starting alice, bob, charlie and testing", flush=True)
    return mnist_children(
        source, device=options.device, fast_kernels=options.fast_kernels, verbose=options.verbose
    )


# ------------------------------------------------------------------------------------------- output


def _bars() -> Any:
    """tqdm's class of progress bars, for terminals or for notebooks."""
    return needed("tqdm.auto", by="this run").tqdm


def _say(text: str) -> None:
    _bars().write(text)
    sys.stdout.flush()


def _evaluated(name: str, result: EvaluationResult) -> Evaluation:
    """Prints a model's evaluation and keeps what the report needs."""
    title = "Federated model" if name == FEDERATED else f"Model update {name}"
    histogram, correct = result.histogram or [], result.correct or 0
    shares = [
        f"{first}-{last}: {100 * sum(histogram[first : last + 1]) / max(1, result.samples):.0f}%"
        for first, last in DIGIT_GROUPS
    ]
    accuracy = correct / max(1, result.samples)
    _say(f"  {title}: Percentage numbers {', '.join(shares)}")
    _say(
        f"  {title}: Average loss: {result.loss:.4f}, "
        f"Accuracy: {correct}/{result.samples} ({100 * accuracy:.2f}%)"
    )
    return Evaluation(result.loss, accuracy, histogram)


def _write(
    options: argparse.Namespace, folder: Path, report: Report, state: Mapping[str, torch.Tensor]
) -> None:
    import torch
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    content, disk = save(tensors), Disk()
    try:
        disk.write_whole(folder / "model.safetensors", [content])
        if options.save_model and options.save_model.endswith(".safetensors"):
            disk.write_whole(Path(options.save_model), [content])
        elif options.save_model:
            whole = io.BytesIO()
            torch.save(tensors, whole)
            disk.write_whole(Path(options.save_model), [whole.getbuffer()])
        disk.write_whole(Path(options.report or folder / "report.json"), [report.to_json().encode()])
        plot(report, folder / "accuracy.png")
    except OSError as error:
        raise RunFolderError(
            f"the run is over, and could not be written ({error.strerror or error}); its model is in the newest "
            f"checkpoint: make room, then planrt run --resume {shlex.quote(str(folder))}"
        ) from error
    run_folder = RunFolder(folder)
    try:
        run_folder.write_down("finished", accuracy=report.final_accuracy)
    finally:
        run_folder.close()


def _print_summary(options: argparse.Namespace, folder: Path, report: Report, seconds: float) -> None:
    accuracy = "unknown" if report.final_accuracy is None else f"{100 * report.final_accuracy:.2f}%"
    print(
        f"\nFinal accuracy {accuracy} on {report.dataset} "
        f"after {len(report.rounds)} rounds\n"
        f"  time:    {seconds:.1f} s in all; {report.median_seconds:.3f} s a round, not evaluating (median)\n"
        f"  traffic: {report.median_bytes:,} bytes per round and worker (median, both ways)\n"
        f"  report:  {options.report or folder / 'report.json'}\n"
        f"  model:   {folder / 'model.safetensors'}"
        + (f" and {options.save_model}" if options.save_model else "")
        + f"\n  plot:    {folder / 'accuracy.png'}",
        flush=True,
    )


def _versions() -> dict[str, str]:
    import numpy as np
    import torch

    from planrt.version import VERSION

    return {
        "planrt": VERSION,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


if __name__ == "__main__":
    leave(main())
