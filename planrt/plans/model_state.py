"""The border between a module and the state of its plans: which entry of `state_dict()` is which tensor of a
plan.

A plan has one state entry per *tensor*. A module's `state_dict` has one per *name*: tied weights and layers
that stand in two places have several, buffers that are not persistent have none, and neither have tensors
that belong to the loss, or that the function took from elsewhere. `StateMap` knows both sides of one model,
and translates exactly, both ways: what a round returns is what `load_state_dict` takes.

The border, for a model whose `decoder.weight` is tied to `embed.weight`, with a buffer that is not persistent
and a loss that has class weights:

    key of state_dict     entry of the plans   where the relation is kept
    embed.weight          embed.weight         `keys`
    decoder.weight        embed.weight         `keys`: two keys, one entry
    norm.running_mean     norm.running_mean    `keys`
    (none)                mask                 `unsaved`: the model has it under that name
    (none)                loss.weight          nowhere: `entries` has its value, the model has no such tensor
    _extra_state          (none)               `extra`: handed through as it was

From state to entries (`by_entry`): an entry is looked up under each of its keys. Two keys of one entry must
hold equal values, since one tensor cannot have two; that they are equal is checked, not assumed. Entries
without a key come from `ModelState.rest`, and from a plain dict, which has none, as they were when the model
was recorded. From entries to state (`named`): each key gets its entry's tensor, so tied keys get one and the
same object, and `rest` gets the others. So ``by_entry(named(e))`` has the entries e again, and
``named(by_entry(s))`` equal tensors under the keys of s, for each state s that is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from planrt.errors import OptionError, TraceError
from planrt.plans.recording.lifting import StateRegistry, attribute_tensors
from planrt.types import TensorSpec

_NAMED = 8  # entries that an error lists


class ModelState(dict[str, torch.Tensor]):
    """The state of a model as `state_dict()` has it: ``model.load_state_dict(state)`` takes it as it is.

    Tied weights stand under each of their names, as one tensor. `rest` holds what a `state_dict` has no name
    for and the plans need all the same, by its name in the plan: buffers that are not persistent, tensors of
    the loss. Handed on from round to round it goes along; a plain dict without it means their values of
    today.
    """

    def __init__(
        self, entries: Mapping[str, torch.Tensor], *, rest: Mapping[str, torch.Tensor], metadata: Any = None
    ) -> None:
        super().__init__(entries)
        self.rest = dict(rest)
        if metadata is not None:
            self._metadata = metadata  # versions of the modules, which load_state_dict looks at


@dataclass(frozen=True, slots=True)
class StateMap:
    """The exact relation between a model, its `state_dict`, and the state entries of its plans.

    Attributes:
        keys: key in `state_dict` -> name of the plan's entry; several keys where weights are tied.
        entries: name -> the tensor that was recorded, detached, in the order of the plan's state.
        unsaved: names of the entries that are the model's, and not in its `state_dict`.
        extra: the other items of `state_dict`, which no plan knows (`get_extra_state`), as they were.
        metadata: the versions of the modules, which go along with a `state_dict`.
    """

    keys: Mapping[str, str]
    entries: Mapping[str, torch.Tensor]
    unsaved: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)
    metadata: Any = None

    @property
    def state(self) -> ModelState:
        """The state with the tensors that were recorded; they share memory with the model."""
        return self.named(self.entries)

    def named(self, entries: Mapping[str, torch.Tensor]) -> ModelState:
        """`entries`, which has every entry of the plans by name, as the model's state."""
        known = set(self.keys.values())
        return ModelState(
            {**{key: entries[name] for key, name in self.keys.items()}, **self.extra},
            rest={name: tensor for name, tensor in entries.items() if name not in known},
            metadata=self.metadata,
        )

    def by_entry(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns a tensor for every entry of the plans, in their order: the inverse of `named`.

        Raises:
            OptionError: `state` lacks entries of the model, has some that the model has not, or has different
                values for weights that are tied.
        """
        if not isinstance(state, Mapping):
            raise OptionError(
                f"a state is a dict of tensors by name, as config.state and model.state_dict() give it, not "
                f"{type(state).__name__}"
            )
        self._check_names(state)
        rest = state.rest if isinstance(state, ModelState) else {}
        found: dict[str, torch.Tensor] = {}
        for key, name in self.keys.items():
            tensor = state[key]
            if not isinstance(tensor, torch.Tensor):
                raise OptionError(f"{key!r} of the state must be a tensor, not {type(tensor).__name__}")
            like = TensorSpec.of(self.entries[name])
            if tensor.layout is not torch.strided or not like.accepts(tensor):
                kind = "" if tensor.layout is torch.strided else f" ({tensor.layout})"
                raise OptionError(
                    f"{key!r} of the state is {TensorSpec.of(tensor)}{kind}, and the model's is {like}"
                )
            first = found.setdefault(name, tensor)
            if first is not tensor and not _equal(first, tensor):
                other = next(one for one, entry in self.keys.items() if entry == name)
                raise OptionError(
                    f"{other!r} and {key!r} are one tensor of the model (tied weights), and differ in this state"
                )
        return {
            name: found[name] if name in found else rest.get(name, own) for name, own in self.entries.items()
        }

    def assign(
        self, state: Mapping[str, torch.Tensor], entries: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Writes `entries` into the tensors of `state`; returns all entries of the plans, as they are
        then."""
        held = self.by_entry(state)
        places = [(state[key], name) for key, name in self.keys.items()]
        if isinstance(state, ModelState):
            places += [(tensor, name) for name, tensor in state.rest.items()]
        for tensor, name in places:
            if name in entries:
                tensor.detach().copy_(entries[name])
        written = {name for _, name in places}
        return {**held, **{name: value for name, value in entries.items() if name not in written}}

    def changed(self, state: Mapping[str, torch.Tensor], entries: Mapping[str, torch.Tensor]) -> ModelState:
        """`state` with `entries`, some entries of the plans by name, in it under all of their keys."""
        return self.named({**self.by_entry(state), **entries})

    def keyed(self, entries: Mapping[str, torch.Tensor]) -> ModelState:
        """Returns some entries of the plans as the part of the model's state that they are."""
        known = set(self.keys.values())
        return ModelState(
            {key: entries[name] for key, name in self.keys.items() if name in entries},
            rest={name: tensor for name, tensor in entries.items() if name not in known},
            metadata=self.metadata,
        )

    def of(self, model: Any) -> ModelState:
        """Returns the state of `model`, the one that was recorded or one built like it, as it is now; shares
        its memory.

        Raises:
            OptionError: a model with other names.
        """
        if not isinstance(model, torch.nn.Module):
            return self.state
        own = model.state_dict(keep_vars=True)
        self._check_names(own)
        held = {name: tensor for name, tensor in _unsaved(model) if name in self.unsaved}
        saved = set(self.keys.values())
        return ModelState(
            {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in own.items()},
            rest={
                name: held.get(name, tensor).detach()
                for name, tensor in self.entries.items()
                if name not in saved
            },
            metadata=getattr(own, "_metadata", None),
        )

    def on(self, model: Any) -> StateMap:
        """Returns the same map for `model`, one built like that which was recorded, with its tensors.

        Raises:
            OptionError: a model with other names.
        """
        state = self.of(model)
        extra = {key: value for key, value in state.items() if key not in self.keys}
        return replace(self, entries=self.by_entry(state), extra=extra)

    def forgetful(self) -> StateMap:
        """Returns the map without the model's own tensors: it keeps none of them alive. `on` gives it some
        again."""
        model = set(self.keys.values()) | self.unsaved
        entries = {
            name: torch.empty_like(tensor, device="meta") if name in model else tensor.clone()
            for name, tensor in self.entries.items()
        }
        return replace(self, entries=entries, extra=dict.fromkeys(self.extra))

    def write(self, model: torch.nn.Module, state: ModelState) -> None:
        """Loads `state` into `model`, with what `state_dict` has no name for."""
        model.load_state_dict(state)
        with torch.no_grad():
            for name, held in _unsaved(model):
                if name in self.unsaved and name in state.rest:
                    held.copy_(state.rest[name])

    def _check_names(self, state: Mapping[str, Any]) -> None:
        missing = [key for key in self.keys if key not in state]
        odd = [key for key in state if key not in self.keys and key not in self.extra]
        if missing or odd:
            told = [f"it lacks {_listed(missing)}"] if missing else []
            told += [f"the model has no {_listed(odd)}"] if odd else []
            raise OptionError(f"the state does not fit the model that was traced: {'; '.join(told)}")


def map_state(model: Any, registry: StateRegistry) -> StateMap:
    """Returns the map of `model` (a module, or a function without state) whose recording filled `registry`.

    Raises:
        TraceError: a parameter that trains stands in the module, and not in its `state_dict`.
    """
    entries = {entry.name: entry.tensor.detach() for entry in registry.entries}
    keys: dict[str, str] = {}
    extra: dict[str, Any] = {}
    saved = model.state_dict(keep_vars=True) if isinstance(model, torch.nn.Module) else {}
    for key, value in saved.items():
        index = registry.find(value) if isinstance(value, torch.Tensor) else None
        if index is not None:
            keys[key] = registry.entries[index].name
        elif isinstance(value, torch.Tensor) and key in entries:  # TorchScript hands out new objects
            keys[key] = key
        else:
            extra[key] = value
    known = set(keys.values())
    for entry in registry.entries:
        if entry.kind == "parameter" and entry.requires_grad and entry.name not in known:
            raise TraceError(
                f"parameter {entry.name!r} is trained, and state_dict() of {type(model).__name__} does not hold it (a "
                "state_dict hook, or an own state_dict?): what a round trains could not come back"
            )
    held = {id(tensor) for _, tensor in _unsaved(model)} if isinstance(model, torch.nn.Module) else set()
    unsaved = frozenset(
        entry.name for entry in registry.entries if entry.name not in known and id(entry.tensor) in held
    )
    return StateMap(keys, entries, unsaved, extra, getattr(saved, "_metadata", None))


def _unsaved(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What `state_dict` may leave out, under the names that it has in plans: buffers and plain attributes."""
    yield from attribute_tensors(model)
    yield from model.named_buffers(remove_duplicate=False)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if TensorSpec.of(one) != TensorSpec.of(other):
        return False
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return (
        same or torch.equal(one, other.to(one.device)) or torch.allclose(one, other, 0.0, 0.0, equal_nan=True)
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
