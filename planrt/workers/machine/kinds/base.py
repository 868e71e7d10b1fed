"""What a worker asks of a kind of objects, and the object itself as the worker's store holds it. No I/O."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import torch

from planrt.errors import LocalError
from planrt.plans.policy.quotas import Account
from planrt.workers.machine.events import Answer, Steps
from planrt.workers.machine.labels import Label, MemoryLabels
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m

V = TypeVar("V")

Freed: TypeAlias = Iterable[tuple[m.PeerAddress, Sequence[int]]]
"""What other workers can free: for each worker the ids of objects there."""


@dataclass(slots=True, eq=False)
class StoredObject:
    """One object of a worker: a value of some kind, whose it is, and who may read it."""

    value: Any
    """Of one of the store's kinds; None when the op that should have made it failed. Only training replaces it
    (`KeptObjects.replace_state`); ops change the tensor in place."""
    owner: str
    """The session's id; empty for the worker's own. `ObjectStore.change_owner` changes it, with the store's index."""
    label: Label = None
    """Of the operation that made it, never changed by ops. What was written to its memory since is in the store's
    `MemoryLabels`: `ObjectStore.label_of` joins the two, and nobody else may ask this field alone."""
    failure: m.Failure | None = None
    """Why there is no value, or why the last change in place did not happen. In the second case there is a value, and
    the next fetch takes the failure away. Ops set it."""
    hidden_failure: m.Failure | None = None
    """Why the value only stands in for another: an op failed on private values. Told to those who may read these, to
    others never; it goes on to all that is computed from this object. Ops set it."""
    tags: tuple[str, ...] = ()
    """With any, the object is published: others find it, and it outlives its session."""
    description: str = ""
    """For who searches. Clients set it with the tags (`Describe`)."""
    handover: str = ""
    """The token that makes its bearer the owner; empty when it is handed to nobody. A claim takes it away."""
    source: frozenset[str] | None = None
    """The tags of data as its owner put it here, for release rules; None for what was computed. Who found a snapshot
    cannot change them. It counts while nothing has been written to the memory (`ObjectStore.source_of`)."""
    original: bool = False
    """Whether it is what the owner put here, and not a snapshot of it: then further tags go to `source` too."""
    account: Account | None = None
    """Whose quota it counts for, where there are quotas; the store keeps it, and what is `charged` beside tensors."""
    charged: int = 0


class ObjectKind(ABC, Generic[V]):
    """One kind of objects, as the store and the requests about objects ask of it.

    A subclass gives its values' Python type, the `name` that messages use, and whatever of the methods differs from
    what stands here: a kind without tensors, that nobody finds, copies, fetches or moves. Methods are called with
    values of that type only, on the worker's compute thread.
    """

    python_type: ClassVar[type]
    """Python type of the values."""
    name: ClassVar[Any]
    """What listings and searches call it: one of the words of `ListedItem.kind` and `FoundItem.kind`."""
    elsewhere: ClassVar[bool] = False
    """Whether the object stands for one on another worker, which then runs the ops on it."""
    made_by_ops: ClassVar[bool] = False
    """Whether an op may return it."""
    outlives_session: ClassVar[bool] = True
    """Whether it stays when it is published and its session ends."""

    # In the store.

    def tensors(self, value: V) -> Sequence[torch.Tensor]:
        """Returns the tensors that it holds: their memory's labels are the object's too."""
        return ()

    def kept(self, value: V) -> Sequence[torch.Tensor]:
        """Returns the tensors whose memory counts for the quota of its user."""
        return self.tensors(value)

    def bytes_beside(self, value: V) -> int:
        """Returns the bytes that it takes besides these, about."""
        return 0

    def gains_gradient(self, value: V) -> bool:
        """Returns whether a backward pass may leave a gradient at it: whether it is a leaf."""
        return False

    def can_be_found(self, value: V) -> bool:
        """Returns whether a search shows it."""
        return False

    def snapshot(self, value: V) -> V:
        """Returns a copy for who found it. Neither side may see what the other writes from then on.

        Raises:
            LocalError: it is not shared.
        """
        raise LocalError(f"objects of the kind {self.name!r} cannot be shared")

    def freed(self, value: V) -> Freed:
        """Returns what other workers can free, now that the object is gone."""
        return ()

    # In messages.

    def listed(self, id: int, stored: StoredObject) -> m.ListedItem:
        """Returns what its own session is told about it."""
        return m.ListedItem(id, self.name, None, list(stored.tags), stored.description)

    def found(self, id: int, stored: StoredObject, *, private: bool, snapshot: bool) -> m.FoundItem:
        """Returns what who searches is told about it: nothing that follows from private values."""
        return m.FoundItem(
            id, None, list(stored.tags), stored.description, private, snapshot, self.name
        )  # fmt: skip

    # In requests. The session may read the value, and there is one.

    def read(self, value: V, id: int) -> Answer:
        """Returns the answer to `ReadPlan`: what it does, without its state.

        Raises:
            LocalError: it is no program.
        """
        raise LocalError(f"object {id} is no plan")

    def fetch(
        self, session: Session, id: int, stored: StoredObject, label: Label, memory: MemoryLabels
    ) -> Steps:
        """Returns the answer to `Fetch`: what ``get`` means for it. `label` is the object's.

        Raises:
            GetNotPermitted: a part of it is not for this session. LocalError: it cannot be fetched.
        """
        raise LocalError(f"objects of the kind {self.name!r} cannot be fetched")

    def freed_by_fetch(self, value: V) -> Freed:
        """Returns what other workers can free, once the client has what `fetch` returned and the object is gone."""
        return self.freed(value)

    def label_with_gradient(self, value: V, label: Label, memory: MemoryLabels) -> Label:
        """Returns who may read the object, whose own label is `label`, together with its gradient."""
        return label

    def move(self, stored: StoredObject, body: m.Move, label: Label) -> Steps:
        """Sends it to ``body.peer``, which gets who may read it by `label`.

        Raises:
            LocalError: it cannot be moved.
        """
        raise LocalError(
            "pointers to other workers and protocols cannot be moved: get() it, and move what that gives"
        )


class NoValue(ObjectKind[None]):
    """The kind of results that an op failed to make: whoever uses one is told of the failure."""

    python_type = type(None)
    name: ClassVar[Literal["failed"]] = "failed"
    outlives_session = False


class ObjectKinds:
    """The kinds of one worker's objects, found by the Python types of their values."""

    def __init__(self, kinds: Iterable[ObjectKind[Any]] = ()) -> None:
        self._kinds: list[ObjectKind[Any]] = []
        self._by_type: dict[type, ObjectKind[Any] | None] = {}
        for kind in kinds:
            self.register(kind)

    def __iter__(self) -> Iterator[ObjectKind[Any]]:
        return iter(self._kinds)

    def register(self, kind: ObjectKind[Any]) -> None:
        """Adds a kind of objects.

        Raises:
            LocalError: there is one for values of that type.
        """
        if any(kind.python_type is known.python_type for known in self._kinds):
            raise LocalError(f"there is a kind of objects for {kind.python_type.__name__} already")
        self._kinds.append(kind)
        self._by_type.clear()

    def find(self, value: Any) -> ObjectKind[Any] | None:
        """Returns the kind of `value`; None if no worker keeps such values."""
        cls = type(value)
        try:
            return self._by_type[cls]
        except KeyError:
            kind = next((kind for kind in self._kinds if issubclass(cls, kind.python_type)), None)
            self._by_type[cls] = kind
            return kind

    def of(self, value: Any) -> ObjectKind[Any]:
        """Returns the kind of `value`.

        Raises:
            LocalError: no worker keeps such values.
        """
        kind = self._by_type.get(type(value)) or self.find(value)
        if kind is None:
            raise LocalError(f"a worker keeps no objects of type {type(value).__name__}")
        return kind
