"""How a plan is called: from Python arguments to its flat list of input tensors, and back.

A graph takes tensors by number. People call plans with keywords, defaults, nested lists and dicts, and whole
modules. A `Signature` holds what one recording made of them: tensors became inputs (a `Ref` each), a module
became a dict of its parameters and buffers by name, and every other value is a constant of the plan, which a
later call cannot change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch

from planrt.errors import PlanArgumentError, PlanFormatError
from planrt.serde.values import decode, encode, pack
from planrt.types import Nested, Ref, leaves

ParameterKind = Literal["positional", "keyword", "args", "kwargs"]

_KINDS: Final[dict[Any, ParameterKind]] = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_POSITIONAL: "args",
    inspect.Parameter.VAR_KEYWORD: "kwargs",
}
_PYTHON_KINDS: Final[dict[ParameterKind, Any]] = {
    "positional": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "args": inspect.Parameter.VAR_POSITIONAL,
    "kwargs": inspect.Parameter.VAR_KEYWORD,
}
MAX_PARAMETERS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the function; `default` says whether a call may leave it out."""

    name: str
    kind: ParameterKind
    default: bool


@dataclass(frozen=True)
class Signature:
    """The parameters of a plan, and what each was when it was recorded.

    `arguments` maps parameter names to nested values whose leaves are a `Ref` to an input, or a constant. A
    parameter that was left out and whose default is no constant (a tensor, say) is not among them: the
    default is state of the plan.
    """

    parameters: tuple[Parameter, ...]
    arguments: Mapping[str, Nested]
    input_names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names: dict[int, str] = {}
        for name, value in self.arguments.items():
            _name_inputs(value, name, names)
        object.__setattr__(self, "input_names", tuple(names[index] for index in sorted(names)))

    @property
    def count(self) -> int:
        """The number of input tensors."""
        return len(self.input_names)

    def bind(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Returns the input tensors of a call of plan `name`, in order.

        Raises:
            PlanArgumentError: arguments that the plan was not recorded with; says which, and what to do.
        """
        given = _bound(self._python(), name, args, kwargs)
        inputs: dict[int, torch.Tensor] = {}
        for parameter in self.parameters:
            recorded = self.arguments.get(parameter.name, _ABSENT)
            value = given.get(parameter.name, _ABSENT)
            if value is _ABSENT:
                if recorded is not _ABSENT and any(isinstance(leaf, Ref) for leaf in leaves(recorded)):
                    raise PlanArgumentError(
                        f"plan {name!r} was built with a tensor for {parameter.name!r}: pass one"
                    )
                continue
            if recorded is _ABSENT:
                raise PlanArgumentError(
                    f"plan {name!r} was built without {parameter.name!r}, so its default is part of the plan: "
                    "leave it out, or build the plan with it"
                )
            _match(recorded, value, parameter.name, name, inputs)
        return [inputs[index] for index in range(self.count)]

    def call(
        self,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        modules: Mapping[str, torch.nn.Module],
    ) -> Any:
        """``function(...)`` as it was called for the recording, with these input tensors.

        `modules` stand in the places that `recorded_signature` gave them; they hold their inputs already.
        """

        def filled(value: Nested, path: str) -> Any:
            if path in modules:
                return modules[path]
            if isinstance(value, Ref):
                return inputs[value.index]
            if isinstance(value, tuple | list):
                return type(value)(filled(item, f"{path}.{index}") for index, item in enumerate(value))
            if isinstance(value, dict):
                return {key: filled(item, f"{path}.{key}") for key, item in value.items()}
            return value

        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        skipped = False
        for parameter in self.parameters:
            if parameter.name not in self.arguments:
                skipped = True
                continue
            value = filled(self.arguments[parameter.name], parameter.name)
            if parameter.kind == "args":
                args.extend(value)
            elif parameter.kind == "kwargs":
                kwargs.update(value)
            elif parameter.kind == "positional" and not skipped:
                args.append(value)
            else:
                kwargs[parameter.name] = value
        return function(*args, **kwargs)

    def _python(self) -> inspect.Signature:
        return inspect.Signature(
            [
                inspect.Parameter(
                    one.name,
                    _PYTHON_KINDS[one.kind],
                    default=None if one.default else inspect.Parameter.empty,
                )
                for one in self.parameters
            ]
        )

    def encoded(self) -> list[Any]:
        """As msgpack takes it; `decoded` reads it."""
        return [
            [[one.name, one.kind, one.default] for one in self.parameters],
            [[name, encode(value)] for name, value in self.arguments.items()],
        ]

    @classmethod
    def decoded(cls, parts: Any) -> Signature:
        """Decodes what `encoded` made, and checks every part of it.

        Raises:
            PlanFormatError: anything else.
        """
        try:
            parameters = [Parameter(name, kind, default) for name, kind, default in parts[0]]
            arguments = {name: decode(value) for name, value in parts[1]}
        except (TypeError, ValueError, IndexError, KeyError):
            raise PlanFormatError("malformed plan: its signature cannot be read") from None
        names = [one.name for one in parameters]
        well_formed = (
            len(parts) == 2
            and len(parameters) <= MAX_PARAMETERS
            and all(isinstance(name, str) and name.isidentifier() for name in names)
            and all(one.kind in get_args(ParameterKind) and type(one.default) is bool for one in parameters)
            and len(set(names)) == len(names)
            and set(arguments) <= set(names)
        )
        if not well_formed:
            raise PlanFormatError("malformed plan: its signature cannot be read")
        refs = [leaf.index for value in arguments.values() for leaf in leaves(value) if isinstance(leaf, Ref)]
        if refs != list(range(len(refs))):
            raise PlanFormatError("malformed plan: its signature does not name its inputs in order")
        made = cls(tuple(parameters), arguments)
        try:
            made._python()
        except ValueError as error:
            raise PlanFormatError(f"malformed plan: its signature is none ({error})") from None
        return made


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT: Final = _Absent()


def recorded_signature(
    python: inspect.Signature, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Signature, list[torch.Tensor], dict[str, torch.nn.Module]]:
    """Records how a plan is called from a call with example arguments.

    Returns the signature, the example tensors in its order, and the modules among the arguments, by the path
    of their place ("model", "nets.0").

    Raises:
        PlanArgumentError: arguments that do not fit the function, or that no plan can take.
    """
    given = _bound(python, name, args, kwargs)
    tensors: list[torch.Tensor] = []
    modules: dict[str, torch.nn.Module] = {}

    def structure(value: Any, path: str) -> Nested:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return Ref(len(tensors) - 1)
        if isinstance(value, torch.nn.Module):
            modules[path] = value
            return {key: structure(tensor, f"{path}.{key}") for key, tensor in module_tensors(value).items()}
        if isinstance(value, tuple):
            return tuple([structure(item, f"{path}.{index}") for index, item in enumerate(value)])
        if isinstance(value, list):
            return [structure(item, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise PlanArgumentError(f"{name}: the keys of {path} must be strings, not {key!r}")
            return {key: structure(item, f"{path}.{key}") for key, item in value.items()}
        try:
            pack(encode(value))
        except PlanFormatError:
            raise PlanArgumentError(
                f"{name}: {path} is a {type(value).__name__}: plans take tensors, modules, numbers, strings, and "
                "tuples, lists and dicts of these"
            ) from None
        return value

    arguments: dict[str, Nested] = {}
    parameters = []
    for parameter in python.parameters.values():
        has_default = parameter.default is not parameter.empty
        parameters.append(Parameter(parameter.name, _KINDS[parameter.kind], has_default))
        if parameter.name in given:
            arguments[parameter.name] = structure(given[parameter.name], parameter.name)
        elif has_default:
            constant = not any(
                isinstance(leaf, torch.Tensor | torch.nn.Module) for leaf in leaves(parameter.default)
            )
            if constant and _is_encodable(parameter.default):
                arguments[parameter.name] = parameter.default
    return Signature(tuple(parameters), arguments), tensors, modules


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module by name, each tensor once, in module order."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_encodable(value: Any) -> bool:
    try:
        pack(encode(value))
    except PlanFormatError:
        return False
    return True


def _bound(
    python: inspect.Signature, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return dict(python.bind(*args, **kwargs).arguments)
    except TypeError as error:
        takes = ", ".join(str(one).partition("=")[0].strip() for one in python.parameters.values())
        count = f"got {len(args)}" + (f" and {', '.join(kwargs)}" if kwargs else "")
        raise PlanArgumentError(f"{name} takes ({takes}), {count}: {error}") from None


def _match(recorded: Nested, value: Any, path: str, name: str, inputs: dict[int, torch.Tensor]) -> None:
    """Collects the inputs of `value`, which must have the structure that was recorded."""
    if isinstance(recorded, Ref):
        if not isinstance(value, torch.Tensor):
            raise PlanArgumentError(
                f"{path} of plan {name!r} is a tensor, got {type(value).__name__} {_short(value)}"
            )
        inputs[recorded.index] = value
        return
    if isinstance(value, torch.nn.Module):
        value = module_tensors(value)
    if isinstance(recorded, dict):
        if not isinstance(value, dict) or set(value) != set(recorded):
            got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise PlanArgumentError(
                f"{path} of plan {name!r} has the entries {', '.join(recorded) or 'none'}; got {got}"
            )
        for word, item in recorded.items():
            _match(item, value[word], f"{path}.{word}", name, inputs)
    elif isinstance(recorded, tuple | list):
        if not isinstance(value, tuple | list) or len(value) != len(recorded):
            count = len(value) if isinstance(value, tuple | list) else type(value).__name__
            raise PlanArgumentError(f"{path} of plan {name!r} has {len(recorded)} items, got {count}")
        for index, (item, part) in enumerate(zip(recorded, value, strict=True)):
            _match(item, part, f"{path}.{index}", name, inputs)
    elif isinstance(value, torch.Tensor) or not _same(recorded, value):
        raise PlanArgumentError(
            f"{path} of plan {name!r} is fixed at {recorded!r}, as it was built, and cannot be {_short(value)}: build "
            "another plan, or make it a tensor"
        )


def _same(recorded: Any, value: Any) -> bool:
    try:
        return pack(encode(recorded)) == pack(encode(value))
    except PlanFormatError:
        return False


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _name_inputs(value: Nested, path: str, names: dict[int, str]) -> None:
    if isinstance(value, Ref):
        names[value.index] = path
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            _name_inputs(item, f"{path}.{index}", names)
    elif isinstance(value, dict):
        for word, item in value.items():
            _name_inputs(item, f"{path}.{word}", names)
