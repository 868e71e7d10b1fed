"""`Plan`: a function or module that is recorded once and runs anywhere. `func2plan` makes one of a function.

A plan is an `nn.Module`. Before `build` it runs its Python code, like any function or module. `build` records
it (`planrt.plans.recording.tracer`), and from then on the op list runs: here when it is called, and on
workers when it was sent. Its parameters and buffers are the state of the plan; so are tensors that the
function uses but was not given.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Self, overload

import torch
from typing_extensions import ParamSpec, TypeVar

from planrt.deadlines import bounded
from planrt.errors import LocalError, OptionError, PlanArgumentError, PlanError, PlanFormatError, TraceError
from planrt.lazy import names_of
from planrt.plans.forms.state_tree import hold
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import PlanRecord, state_hash
from planrt.plans.ir.signature import Signature, recorded_signature
from planrt.plans.other_sizes import Forms, fits, form_for, has_code
from planrt.plans.plan_state import PlanState
from planrt.plans.recording.building import examples_of, leading_dims, record_in_both_modes
from planrt.plans.recording.inlining import inline
from planrt.plans.recording.recorder import SizesFixedError
from planrt.plans.recording.trace_warnings import told_once
from planrt.plans.recording.traced_run import active_recorder
from planrt.plans.running.interpreter import check_inputs, execute
from planrt.plans.showing import plan_html, plan_line, plan_text
from planrt.types import TensorSpec

if TYPE_CHECKING:
    from planrt.plans.analysis.report import Report
    from planrt.plans.functions import func2plan
    from planrt.plans.policy.rules import Policy

__all__ = ["Plan", "PlanState", "func2plan"]

__getattr__ = names_of(__name__, {"func2plan": "planrt.plans.functions"})

P = ParamSpec("P", default=...)
R = TypeVar("R", default=Any)


class Plan(torch.nn.Module, Generic[P, R]):
    """A PyTorch program that is recorded once and runs on workers with one message.

    Made by `func2plan`, or by deriving from it, as from `nn.Module`, with a `forward`::

        class Net(planrt.Plan):
            def __init__(self):
                super().__init__()
                self.fc = torch.nn.Linear(2, 3)

            def forward(self, x):
                return self.fc(x).relu()

        net = Net()
        net.build(torch.zeros(4, 2))
        pointer = net.send(bob)(x_on_bob)

    For type checkers a plan that `func2plan` makes takes and returns what its function does.

    Attributes:
        name: what it is called when printed. id: its number in this process.
        tags, description: what `search` finds it by, once it is sent.

    Args:
        function: what the plan does; leave it out in classes with a `forward`.
        name: by default the function's or the class's.
        state: tensors that the function gets as a `PlanState`, after its other arguments.
        strict: refuse arguments of other sizes, ranks or dtypes than the plan was built with, instead of
            recording a form of it for them (`planrt.plans.other_sizes`).
    """

    _function: Callable[..., Any] | None

    def __init__(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        state: Sequence[torch.Tensor] | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        # Not as a submodule: a module that is the function has its state under its own names.
        self.__dict__["_function"] = function
        if isinstance(function, torch.nn.Module):
            self.training = function.training
        self.name: str = name or str(getattr(function, "__name__", type(function or self).__name__))
        self.id: int = secrets.randbits(40)
        self._record: PlanRecord | None = None
        self.strict: bool = strict
        self._captured: dict[str, torch.Tensor] = {}
        self._forms: Forms = OrderedDict()
        self._pointers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        """worker -> where the plan was sent by a call with pointers, so that the next call need not send
        it."""
        self._sent_to: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._tags: tuple[str, ...] = ()
        self._description = ""
        self.state: PlanState | None = None if state is None else PlanState(state)
        if function is not None:
            functools.update_wrapper(self, function, updated=())
            del self.__wrapped__  # `inspect.signature` would show the function's, state and all

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the Python code; classes of your own define it."""
        if self._function is None:
            raise PlanError(f"plan {self.name!r} has no forward: define one, or give a function")
        if self.state is None:
            return self._function(*args, **kwargs)
        place = list(inspect.signature(self._function).parameters).index(self._state_name())
        if len(args) >= place:
            return self._function(*args[:place], self.state, *args[place:], **kwargs)
        return self._function(*args, **kwargs, **{self._state_name(): self.state})

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the plan, and of the module that it was made of."""
        super().train(mode)
        if isinstance(self._function, torch.nn.Module):
            self._function.train(mode)
        return self

    # ------------------------------------------------------------------------------------ recording

    @property
    def is_built(self) -> bool:
        """Tells whether the plan has been recorded."""
        return self._record is not None

    @property
    def record(self) -> PlanRecord:
        """All of the plan but the values of its state.

        Raises:
            PlanError: not built yet.
        """
        if self._record is None:
            raise PlanError(
                f"plan {self.name!r} is not built: call {self.name}.build(...) with example tensors"
            )
        return self._record

    @property
    def graph(self) -> Graph:
        """The recorded ops, in the form for the mode the plan is in (`train`, `eval`).

        Raises:
            PlanError: not built yet, or not in that mode.
        """
        return self.record.graph(training=self.training)

    @told_once()
    def build(
        self,
        *examples: Any,
        free_dims: Sequence[Sequence[int]] | None = None,
        strict: bool | None = None,
        **keywords: Any,
    ) -> Self:
        """Record the plan on example arguments, and return it. Building again replaces what was recorded.

        Arguments are as the function takes them: tensors, modules (their parameters and buffers become
        inputs), and tuples, lists and dicts of these. Anything else becomes a constant.

        Args:
            examples, keywords: the arguments.
            free_dims: per input tensor, the dimensions that may differ at run time. By default dimension 0 is
                free as far as the function takes that: of every tensor, else of those that share the size of
                the first one's, else of the first one, else of none. Modules' tensors have fixed sizes.
            strict: whether calls with other sizes, ranks or dtypes are refused; by default as the plan was
                made.

        Raises:
            PlanArgumentError: arguments that do not fit the function, or that no plan can take.
            TraceError: the function cannot be recorded; names the line.
        """
        if strict is not None:
            self.strict = bool(strict)
        signature, tensors, modules = recorded_signature(self._signature(), self.name, examples, keywords)
        if free_dims is not None:
            return self._built(signature, tensors, modules, free_dims)
        for leading in leading_dims(signature, tensors, modules):
            try:
                return self._built(signature, tensors, modules, leading)
            except SizesFixedError:
                continue
        return self._built(signature, tensors, modules, [()] * len(tensors))

    def build_from_shapes(self, shapes: Sequence[Sequence[int]]) -> Self:
        """Record the plan on float32 tensors of these shapes, one per argument, -1 for a size that stays
        free.

        Raises:
            PlanArgumentError: a wrong number of shapes, or shapes that are none or do not fit the function.
        """
        examples, free = examples_of(self.name, self._signature(), shapes)
        try:
            return self.build(*examples, free_dims=free)
        except TraceError as error:
            if isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, TraceError):
                raise PlanArgumentError(
                    f"{self.name} could not be built with args_shape {list(shapes)}: {error}; check the shapes, and "
                    "that arguments that are no float32 tensors are given to build() instead"
                ) from error
            raise

    def _built(
        self,
        signature: Signature,
        tensors: Sequence[torch.Tensor],
        modules: Mapping[str, torch.nn.Module],
        free_dims: Sequence[Sequence[int]],
    ) -> Self:
        inner = [self._function] if isinstance(self._function, torch.nn.Module) else []
        found, registry = record_in_both_modes(
            self.forward,
            [self, *inner],
            signature,
            tensors,
            modules,
            free_dims,
            name=self.name,
            doc=inspect.getdoc(self if self._function is not None else type(self)) or "",
            moody=bool(inner) or any(part not in (self, self.state) for part in self.modules()),
        )
        own = dict(self._own_tensors())
        self._captured = {
            entry.name: entry.tensor for entry in registry.entries if own.get(entry.name) is not entry.tensor
        }
        self._record = found
        self._forms.clear()
        return self

    def _signature(self) -> inspect.Signature:
        """The parameters of a call: those of `forward` or of the function, without the state."""
        if self._function is None:
            return inspect.signature(self.forward)
        target = self._function
        found = inspect.signature(target.forward if isinstance(target, torch.nn.Module) else target)
        if self.state is None:
            return found
        parameters = [one for one in found.parameters.values() if one.name != self._state_name()]
        return found.replace(parameters=parameters)

    def _state_name(self) -> str:
        """Which parameter of the function takes the state: the one called ``state``, or the last."""
        assert self._function is not None  # noqa: S101 - only function plans have such a state
        names = list(inspect.signature(self._function).parameters)
        if not names:
            raise PlanArgumentError(f"{self.name} has state, and no argument to take it")
        return "state" if "state" in names else names[-1]

    # -------------------------------------------------------------------------------------- running

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the plan: the recorded ops on its own state, or before `build` its Python code.

        Given pointers, it is sent to their worker and runs there; if the module that it was made of is on a
        worker, its Python code runs on that.

        Raises:
            PlanArgumentError: arguments that do not fit, and for which the plan cannot be recorded.
            ExecutionError: an op failed.
        """
        result: R = self._run(args, kwargs)
        return result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._record is None:
            return super().__call__(*args, **kwargs)
        inputs = self._record.signature.bind(self.name, args, kwargs)
        if torch._C._is_tracing():
            from planrt.plans.forms.torchscript import under_trace  # it imports much that plans do not need

            return under_trace(self.graph, inputs, self.state_tensors())
        if active_recorder() is not None:
            if not fits(self, inputs) and has_code(self) and not self.strict:
                return super().__call__(*args, **kwargs)  # recorded as part of what calls it
            return inline(self.graph, inputs, self.state_tensors())
        for tensor in inputs:
            location = getattr(tensor, "location", None)
            if location is not None:
                if has_code(self) and self._is_away():
                    return super().__call__(*args, **kwargs)  # where its module is, op by op
                pointer = self._pointers[location] = location.workplace.plans.send(self)
                return pointer(*args, **kwargs)
        try:
            return self._executed(inputs)
        except PlanArgumentError as error:
            form = form_for(self, args, kwargs, inputs, error)
        return form(*args, **kwargs)

    def _executed(self, inputs: Sequence[torch.Tensor]) -> Any:
        state = self.state_tensors()
        shared: Any = next((one for one in (*inputs, *state) if getattr(type(one), "in_shares", False)), None)
        if shared is not None:  # the parties run it, and get it whole
            made = shared.session.call_plan(self.record, inputs, state, training=self.training)
            if made is not NotImplemented:
                return made
        return execute(self.graph, inputs, state)

    def state_tensors(self) -> list[torch.Tensor]:
        """Returns the tensors of the plan's state, in its order: parameters, buffers, and what it
        captured."""
        held = self._held()
        return [held[entry.name] for entry in self.record.state]

    def _is_away(self) -> bool:
        return any(getattr(tensor, "location", None) is not None for tensor in self.state_tensors())

    def state_here(self) -> list[torch.Tensor]:
        """`state_tensors`, none of them on a worker.

        Raises:
            PlanError: a module of the plan was sent.
        """
        tensors = self.state_tensors()
        for entry, tensor in zip(self.record.state, tensors, strict=True):
            where = getattr(tensor, "location", None)
            if where is not None:
                raise PlanError(
                    f"state {entry.name!r} of plan {self.name!r} is on worker {where.id!r}: get() the module first"
                )
        return tensors

    def _held(self) -> dict[str, torch.Tensor]:
        return {**dict(self._own_tensors()), **self._captured}

    def _own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for module in (self, self._function):
            if isinstance(module, torch.nn.Module):
                yield from module.named_parameters(remove_duplicate=False)
                yield from module.named_buffers(remove_duplicate=False)

    def named_state(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of `state_dict()`, themselves; of a plan made of a module, also that
        module's."""
        named: dict[str, torch.Tensor] = {}
        for module in (self, self._function):
            if isinstance(module, torch.nn.Module):
                named |= module.state_dict(keep_vars=True)
        return {key: tensor for key, tensor in named.items() if isinstance(tensor, torch.Tensor)}

    @property
    def hash(self) -> str:
        """The identity of what runs in the current mode; see `Graph.hash`."""
        return self.graph.hash

    @property
    def state_hash(self) -> str:
        """SHA-256 over the values of the state, as 64 hex digits."""
        return state_hash(self.state_here())

    # ------------------------------------------------------------------------------------ travelling

    @bounded
    def send(self, *workers: Any, timeout: float | None = None, **options: Any) -> Any:
        """Sends the plan with its state to workers; returns a pointer to call there, or one that stands for
        several.

        What a worker has already is not sent again. `private` and `allowed_users` are as for tensors: who may
        get the state back. `purpose` says what the plan is for, to an owner who has to approve it.

        Raises:
            PlanError: not built yet. WorkerLostError: a worker's connection has ended.
        """
        self._check_can_go_to(workers)
        return self._sent([worker.workplace.plans.send(self, **options) for worker in workers], workers)

    @bounded
    async def async_send(self, *workers: Any, timeout: float | None = None, **options: Any) -> Any:
        """`send`, to be awaited on any loop."""
        self._check_can_go_to(workers)
        pointers = [await worker.workplace.plans.send_async(self, **options) for worker in workers]
        return self._sent(pointers, workers)

    def _check_can_go_to(self, workers: Sequence[Any]) -> None:
        self.record  # noqa: B018 - raises if there is none
        if not workers:
            raise LocalError("send to whom? write plan.send(worker)")
        for worker in workers:
            if not hasattr(worker, "workplace"):
                raise LocalError(f"send takes workers, not {type(worker).__name__}")

    def _sent(self, pointers: Sequence[Any], workers: Sequence[Any]) -> Any:
        """What `send` returns, noted."""
        self._sent_to.update({worker.id: one for worker, one in zip(workers, pointers, strict=True)})
        return pointers[0] if len(pointers) == 1 else type(pointers[0]).several(pointers)

    def get_pointers(self) -> dict[str, Any]:
        """Worker's id -> the pointer that `send` returned last for that worker, as long as somebody holds
        it."""
        return {one.location.id: one for one in self._sent_to.values() if one._handle.alive}

    def get(self) -> Any:
        """Not for plans that are here: see `PointerPlan.get`."""
        raise PlanError(f"plan {self.name!r} is here already: get() is for what send() returned")

    async def async_get(self) -> Any:
        """`get`, which refuses."""
        return self.get()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_pointers": weakref.WeakKeyDictionary(),
            "_forms": OrderedDict(),
            "_sent_to": weakref.WeakValueDictionary(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.id = secrets.randbits(40)  # a copy is another plan: both may go to one worker

    def copy(self) -> Self:
        """Returns a plan of its own, with a copy of the state: neither changes the other."""
        return copy.deepcopy(self)

    def tag(self, *tags: str) -> Self:
        """Tags the plan; the tags travel with it, and publish it where it is sent."""
        if not all(isinstance(one, str) and 0 < len(one) <= 200 for one in tags):
            raise LocalError("tags are strings of 1 to 200 characters")
        self._tags = (*self._tags, *tags)
        return self

    def describe(self, description: str) -> Self:
        """Gives the plan a description, whose words `search` finds."""
        self._description = str(description)
        return self

    @property
    def tags(self) -> set[str]:
        """Its tags."""
        return set(self._tags)

    @property
    def description(self) -> str:
        """Its description."""
        return self._description

    def save(self, path: str | os.PathLike[str] | BinaryIO) -> None:
        """Writes the plan with its state, mode, tags and description to a file; `planrt.load_plan` reads it.

        `path` may be a binary file that is open for writing, such as an `io.BytesIO`.

        The file holds data only, in the format that `planrt.plans.forms.files` describes. It is complete or
        not there: a failed save leaves what stood at `path`.

        Raises:
            PlanError: not built yet. OptionError: a path that cannot be written.
        """
        from planrt.plans.saving import save_plan  # it imports this module

        save_plan(self, path)

    def to_exported_program(self, *examples: Any, **keywords: Any) -> torch.export.ExportedProgram:
        """Returns the plan in its current mode as an `ExportedProgram` of `torch.export`, with a copy of its
        state.

        It is called as the plan is (``program.module()(x)``), free sizes are dynamic dimensions, and modules
        among the arguments are dicts of their tensors. Constant arguments that have a default are left out.

        Args:
            examples, keywords: arguments to export with; by default zeros.

        Raises:
            PlanError: not built, or an op that torch cannot export; says which, and why.
            PlanArgumentError: examples that do not fit.
        """
        from planrt.plans.forms.export import to_exported_program  # it imports this module

        return to_exported_program(self, examples, keywords)

    def to_onnx(self, path: str | os.PathLike[str], *examples: Any, **keywords: Any) -> None:
        """Writes the plan in its current mode as an ONNX model, with its state; needs ``pip install
        'planrt[onnx]'``.

        Inputs and outputs are the tensors of a call in order. Free sizes stay free. State of more than 1 GiB
        goes into a second file, ``PATH.data``.

        Args:
            path: the file; replaced if it is there.
            examples, keywords: arguments to export with; by default zeros.

        Raises:
            PlanError: not built; an op that ONNX has no form for, or that changes state or inputs: says
                which.
            PlanArgumentError: examples that do not fit. OptionError: a path that cannot be written.
            MissingPackageError: onnx or onnxscript is not installed.
        """
        from planrt.plans.forms.export import to_onnx  # it imports this module

        to_onnx(self, path, examples, keywords)

    @overload
    def check(
        self,
        policy: Policy | None = None,
        inputs: Sequence[TensorSpec | torch.Tensor | None] = (),
        *,
        tags: Mapping[str, Sequence[str]] | None = None,
    ) -> Report: ...

    @overload
    def check(
        self,
        policy: None = None,
        inputs: Sequence[TensorSpec | torch.Tensor | None] = (),
        *,
        bounds: Mapping[str, Sequence[float]],
    ) -> Any: ...

    def check(
        self,
        policy: Policy | None = None,
        inputs: Sequence[TensorSpec | torch.Tensor | None] = (),
        *,
        tags: Mapping[str, Sequence[str]] | None = None,
        bounds: Mapping[str, Sequence[float]] | None = None,
    ) -> Any:
        """Analyses what the plan does in its current mode, from its inputs' shapes, and what it breaks of
        `policy`: a `Report`.

        On arguments in shares (``plan.check(inputs=[x, y])``, of which one at least was shared) it is a preflight
        instead: a `Preflight` with the rounds, the bytes and the correlated randomness of a call, and with `bounds`
        the operations whose results may leave the range of shares.

        Args:
            policy: an owner's rules; without, nothing is violated.
            inputs: per input tensor, in the order of ``graph.input_names``, its spec or a tensor like it. One
                whose sizes the plan fixes may be None, and all may be left out where it fixes all.
            tags: input name -> tags of private data that it is to stand for (``{"x": ["#patients"]}``).
            bounds: name of an input, or of an entry of the state, in shares -> its least and greatest value.

        Raises:
            ValueRangeError: with values in `bounds`, a result is beyond the range whatever they are.
            PlanError: not built. PlanArgumentError: inputs that do not fit. ExecutionError: an op cannot run
                on such.
        """
        from planrt.plans.checking import check_plan  # plans that are only run do without it

        state = self.state_tensors()
        shared: Any = next((one for one in (*inputs, *state) if getattr(type(one), "in_shares", False)), None)
        if shared is not None and policy is None:
            check_inputs(self.graph, inputs)  # type: ignore[arg-type]  # specs are refused there
            return shared.session.check_plan(self.graph, inputs, state, bounds or {})
        if bounds:
            raise OptionError(
                "bounds are of arguments in shares: give inputs=[x.fix_precision().share(...), ...]"
            )
        return check_plan(self, policy, inputs, tags or {})

    # ------------------------------------------------------------------------------------- for people

    @property
    def code(self) -> str:
        """The recorded ops, one per line."""
        return self.graph.code

    @property
    def owner(self) -> Any:
        """The worker that stands for this process."""
        return getattr(torch.empty(0), "owner", None)

    @property
    def readable_plan(self) -> str:
        """The same as `code`, by the name that PySyft 0.2 had for it."""
        return self.code

    @property
    def torchscript(self) -> torch.nn.Module:
        """The plan as TorchScript; see `planrt.plans.forms.torchscript.to_torchscript`."""
        from planrt.plans.forms.torchscript import to_torchscript  # it imports much that plans do not need

        return to_torchscript(replace(self.graph, state_values=tuple(self.state_here())))

    def __str__(self) -> str:
        return plan_text(self)

    def __repr__(self) -> str:
        return plan_line(self)

    def _repr_html_(self) -> str:
        return plan_html(self)

    @classmethod
    def from_record(
        cls,
        record: PlanRecord,
        state: Sequence[torch.Tensor],
        *,
        training: bool = True,
        keys: Mapping[str, str] | None = None,
    ) -> Plan:
        """Makes the plan that a record and its state describe: it has no Python code, and runs its ops.

        `keys` says what `state_dict()` calls the state (key -> name in the record); by default the names of
        the record. What has no key belongs to the plan as captured tensors do.

        Raises:
            PlanFormatError: names that tensors of a module cannot have.
        """
        made = Plan(name=record.name)
        made.__doc__ = record.doc
        made._record = record
        made.training = training
        tensors: dict[str, torch.Tensor] = {}
        for entry, tensor in zip(record.state, state, strict=True):
            value = tensor.detach()
            is_parameter = entry.kind == "parameter"
            tensors[entry.name] = torch.nn.Parameter(value, entry.requires_grad) if is_parameter else value
        if keys is None:
            keys = {name: name for name in tensors}
        hold(made, {key: tensors[name] for key, name in keys.items()})
        made._captured = {name: tensor for name, tensor in tensors.items() if keys.get(name) != name}
        held = made._held()
        if any(held.get(name) is not tensor for name, tensor in tensors.items()):
            raise PlanFormatError("malformed plan: the names of its state cannot be those of a module")
        return made
