"""A network over the columns of several owners, as one object: parts below at each, one above with the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import OptionError, TraceError
from planrt.loop import on_loop, run
from planrt.plans.model_plans import Loss, ModelPlans, trace_model
from planrt.plans.optimizer_options import OPTIMIZERS, check_optimizer
from planrt.vertical.opening import (
    CLIENT,
    DEFAULT_TIMEOUT,
    Plan,
    awaited_form_of,
    number,
    whole,
    with_defaults,
)
from planrt.vertical.parties import Party
from planrt.vertical.runs import TrainedRun, begun
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m


class SplitNetwork(TrainedRun):
    """A network in parts that several owners train together; made by `split_network`."""

    def __init__(
        self,
        workers: Sequence[BaseWorker],
        opens: Sequence[m.OpenJoint],
        *,
        label_owner: int,
        epochs: int,
        parts: Sequence[Sequence[tuple[nn.Module, ModelPlans]]],
    ) -> None:
        super().__init__(workers, opens, label_owner=label_owner, epochs=epochs)
        self._parts = parts

    async def _begin(self) -> None:
        for worker, parts in zip(self._workers, self._parts, strict=True):
            for _, plans in parts:
                for plan in (plans.training, plans.evaluation):
                    await worker.workplace.put_plan(plan)
        await super()._begin()
        if self.resumed:
            return
        state = [
            [one.detach().clone() for _, plans in parts for one in plans.names.entries.values()]
            for parts in self._parts
        ]
        await self._step("load", tensors=state)

    @on_loop
    async def async_get(self) -> None:
        """Does what `get` does, to be awaited on any loop."""
        for place, parts in enumerate(self._parts):
            _, tensors = await self._ask_one(place, "weights")
            rest = list(tensors)
            for module, plans in parts:
                count = len(plans.training.state)
                mine, rest = rest[:count], rest[count:]
                module.load_state_dict(plans.names.named(dict(zip(plans.names.entries, mine, strict=True))))

    def get(self) -> None:
        """Brings the trained weights of all parts back into the modules that they were recorded from.

        Raises:
            PolicyRefusedError: the run was opened with weights_to_client=False: they stay where they are.
        """
        run(self.async_get(), instead="await run.async_get()")


def split_network(
    *parties: Party,
    bottoms: Sequence[nn.Module | None],
    top: nn.Module,
    loss_fn: Loss,
    classes: bool = False,
    epochs: int = 10,
    batch_size: int = 64,
    optimizer: str = "SGD",
    optimizer_args: Mapping[str, Any] | None = None,
    noise: float = 0.0,
    normalise: str = "strip",
    standardise: bool = True,
    holdout: float = 0.0,
    seed: int = 0,
    predictions_to: str = CLIENT,
    weights_to_client: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    purpose: str = "",
    keep: str = "",
    resume: bool = False,
) -> SplitNetwork:
    """Opens a run that trains a network in parts: one below at each party, on its columns, one above with the labels.

    The part above gets what those below give, side by side (`torch.cat`, in the order of the parties, dimension 1).
    Without `noise` the parts have the values, bit for bit, that the whole network has after the same steps. What the
    parts below give goes to the owner of the labels unencrypted: `planrt.workers.machine.joint.networks` says what that
    means. Modules are recorded as plans, which the owners see.

    Args:
        parties: two or more, one with the label.
        bottoms: for each party a module [rows, its columns] -> [rows, any width], or None for one without columns.
        top: [rows, all widths] -> what `loss_fn` takes with the labels: float32 [rows, 1], or int64 [rows] with
            `classes`.
        loss_fn: (prediction, labels) -> a loss without dimensions.
        optimizer, optimizer_args: as `planrt.TrainConfig` takes them; each part has one of its own.
        noise: standard deviation of Gaussian noise that owners add to what leaves them.
        epochs, batch_size, normalise, standardise, holdout, seed, weights_to_client, timeout, purpose, keep, resume: as
            of `linear_regression`; labels are not standardised. A run that goes on may have another ``lr`` among its
            `optimizer_args`.
        predictions_to: "client", or the id of the worker with the labels.

    Raises:
        TraceError: a part cannot be recorded. Everything else as `linear_regression`.
    """
    given = {name: value for name, value in locals().items() if name != "parties"}
    return begun(_recorded(parties, **given), "await async_split_network(...)")


@awaited_form_of(split_network)
async def async_split_network(*parties: Party, **options: Any) -> SplitNetwork:
    """Does what `split_network` does, with its options, to be awaited on any loop; recording the modules is computed
    at once."""
    return await _recorded(parties, **with_defaults(split_network, options))._opened()


def _recorded(
    parties: Sequence[Party],
    *,
    bottoms: Sequence[nn.Module | None],
    top: nn.Module,
    loss_fn: Loss,
    classes: bool,
    epochs: int,
    batch_size: int,
    optimizer: str,
    optimizer_args: Mapping[str, Any] | None,
    noise: float,
    **options: Any,
) -> SplitNetwork:
    """A network whose parts are recorded, and that is not open yet."""
    plan = Plan(parties, **options)
    label_owner = plan.label_owner()
    workers = plan.workers()
    if not isinstance(bottoms, Sequence) or len(bottoms) != len(parties):
        given = len(bottoms) if isinstance(bottoms, Sequence) else repr(bottoms)
        raise OptionError(
            f"bottoms is a list with a module or None for each of the {len(parties)} parties, not {given}"
        )
    for module in (*bottoms, top):
        if not isinstance(module, nn.Module) and (module is not None or module is top):
            raise OptionError(f"a part of a network is an nn.Module, not {module!r}")
    args = check_optimizer(optimizer, optimizer_args)
    _check_apart([*zip(workers, bottoms, strict=False), (workers[label_owner], top)])
    recorded: list[ModelPlans | None] = []
    widths = []
    for party, bottom in zip(parties, bottoms, strict=True):
        if (bottom is None) != (not party.columns):
            raise OptionError(
                f"party {party.worker.id!r} has {len(party.columns)} columns and "
                f"{'no part' if bottom is None else 'a part'} of the network: a part is on columns"
            )
        if bottom is None:
            recorded.append(None)
            widths.append(0)
            continue
        _check_classes_kept(party, bottom, plan.standardise)
        example = torch.zeros(4, len(party.columns))
        try:
            recorded.append(trace_model(bottom, _unused, example, torch.zeros(4)))
        except TraceError as error:
            raise TraceError(
                f"the part of party {party.worker.id!r}, on [rows, {len(party.columns)}]: {error.message}",
                line=error.line,
            ) from error
        widths.append(_width(bottom, example, party.worker.id))
    if not sum(widths):
        raise OptionError("no party has columns: there is nothing to learn from")
    for worker, module in (*zip(workers, bottoms, strict=True), (workers[label_owner], top)):
        _check_trained(module, optimizer, args, worker.id)
    target = torch.zeros(4, dtype=torch.int64) if classes else torch.zeros(4, 1)
    side_by_side = torch.zeros(4, sum(widths))
    above = trace_model(top, loss_fn, side_by_side, target)
    predicted = _evaluated(top, side_by_side)
    known = (
        classes and _is_of_classes(loss_fn) and isinstance(predicted, torch.Tensor) and predicted.dim() == 2
    )
    epochs, batch_size = whole("epochs", epochs, most=1_000_000), whole("batch_size", batch_size)
    models: dict[int, Any] = {}
    parts: list[list[tuple[nn.Module, ModelPlans]]] = []
    for place, below in enumerate(recorded):
        has_top = place == label_owner
        models[place] = m.SplitTerms(
            bottom="" if below is None else below.training.hash,
            bottom_evaluation="" if below is None else below.evaluation.hash,
            top=above.training.hash if has_top else "",
            top_evaluation=above.evaluation.hash if has_top else "",
            widths=widths,
            classes=bool(classes),
            class_count=int(predicted.shape[1]) if known else 0,
            batch_size=batch_size,
            epochs=epochs,
            optimizer=optimizer,
            optimizer_args=args,
            noise=number("noise", noise),
        )
        mine: list[tuple[nn.Module, ModelPlans]] = []
        if below is not None:
            mine.append((bottoms[place], below))  # type: ignore[arg-type]
        if has_top:
            mine.append((top, above))
        parts.append(mine)
    return SplitNetwork(
        workers,
        plan.opens(models, label_owner=label_owner),
        label_owner=label_owner,
        epochs=epochs,
        parts=parts,
    )


def _unused(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss for a part below, whose gradient comes from above: its plan has to have one, and nothing reads it."""
    return prediction.sum()


def _check_classes_kept(party: Party, bottom: nn.Module, standardise: bool) -> None:
    """Raises OptionError if numbers of classes would be standardised before they are looked up."""
    looks_up = any(isinstance(one, nn.Embedding | nn.EmbeddingBag) for one in bottom.modules())
    if looks_up and standardise and not party.as_is:
        raise OptionError(
            f"the part of party {party.worker.id!r} has an nn.Embedding, and all of its columns are standardised: name "
            "those that hold classes in Party(..., as_is=[...]), or take standardise=False"
        )


def _check_apart(parts: Sequence[tuple[BaseWorker, nn.Module | None]]) -> None:
    """Raises OptionError if two parts share a parameter or buffer: each is trained where it is, so they would part."""
    seen: dict[int, str] = {}
    for worker, module in parts:
        state = () if module is None else (*module.named_parameters(), *module.named_buffers())
        mine = {id(tensor): name for name, tensor in state}
        both = [place for place in mine if place in seen]
        if both:
            raise OptionError(
                f"{mine[both[0]]!r} of a part at {worker.id!r} is also in one at {seen[both[0]]!r}: parts share "
                "nothing, since each is trained where it is; give each its own (copy.deepcopy)"
            )
        seen |= dict.fromkeys(mine, worker.id)


def _check_trained(module: nn.Module | None, optimizer: str, args: Mapping[str, Any], whose: str) -> None:
    """Raises OptionError unless such an optimizer trains a part of a network."""
    if optimizer in ("LBFGS", "SparseAdam"):
        why = (
            "computes the loss several times in a step"
            if optimizer == "LBFGS"
            else "takes sparse gradients alone"
        )
        raise OptionError(f"{optimizer} {why}, which parts of a network do not: take Adam or SGD")
    trained = [] if module is None else [one for one in module.parameters() if one.requires_grad]
    if trained:
        try:
            OPTIMIZERS[optimizer](trained, **args)
        except (TypeError, ValueError) as error:
            raise OptionError(f"{optimizer} does not train the part at {whose!r}: {error}") from None


def _is_of_classes(loss_fn: Loss) -> bool:
    """Whether it is known to take as many classes as predictions are wide."""
    if isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss):
        return loss_fn.ignore_index < 0
    return loss_fn in (F.cross_entropy, F.nll_loss)


def _evaluated(module: nn.Module, example: torch.Tensor) -> Any:
    """What a module gives in evaluation mode, which leaves it as it was."""
    modes = {one: one.training for one in module.modules()}
    try:
        with torch.no_grad():
            return module.eval()(example)
    finally:
        for one, mode in modes.items():
            one.training = mode


def _width(bottom: nn.Module, example: torch.Tensor, whose: str) -> int:
    given = _evaluated(bottom, example)
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or len(given) != len(example):
        raise OptionError(f"the part of party {whose!r} gives no tensor [rows, width]")
    if given.dtype != torch.float32:
        raise OptionError(
            f"the part of party {whose!r} gives {str(given.dtype).removeprefix('torch.')}, and float32 is passed on: "
            "end it with .float()"
        )
    return int(given.shape[1])
