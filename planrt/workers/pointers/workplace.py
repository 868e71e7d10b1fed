"""What pointers ask of the place that their objects are at: the interface between them and a client's connection.

`planrt.workers.client.workplace` has the one that talks to a worker. `tests/pointers/recorded.py` has one that writes
down what it is asked: tests of pointers run on it without a worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from planrt.plans.running.inference import Spec
from planrt.workers.wire.posted import Line

if TYPE_CHECKING:
    import torch

    from planrt.plans.ir.record import PlanRecord
    from planrt.plans.plan import Plan
    from planrt.workers.pointers.handle import Handle, Pointer
    from planrt.workers.pointers.histories import Histories
    from planrt.workers.pointers.plan import PointerPlan
    from planrt.workers.pointers.tensor import PointerTensor


class Location(Protocol):
    """A worker, as pointers know it."""

    @property
    def id(self) -> str:
        """The worker's name."""

    @property
    def workplace(self) -> Workplace:
        """The objects of this process's session there. A new session has a new one."""


class Workplace(Protocol):
    """One session's objects on one worker.

    ``post_op``, ``take_drops``, ``draw_seed`` and ``forget`` are called for every op; ``forget`` by finalizers too, in
    any thread and at any time.
    """

    @property
    def why_ended(self) -> str:
        """The reason why the session has ended; ``""`` while it has not."""

    @property
    def op_bytes(self) -> int:
        """The longest packed op that the worker takes, in bytes."""

    @property
    def halts(self) -> bool:
        """True if the worker stops at a backward pass that failed until its client has heard of it."""

    @property
    def gradients(self) -> KnownGradients:
        """The gradients of the objects, as far as they are known."""

    @property
    def ids(self) -> Ids:
        """The ids that are taken there."""

    @property
    def objects(self) -> Objects:
        """Sends, fetches and describes objects."""

    @property
    def plans(self) -> Plans:
        """Does so with plans."""

    @property
    def moves(self) -> Moves:
        """Sends objects on to other workers."""

    def post_op(self, packed: bytes, line: Line | None = None) -> None:
        """Posts a packed op, which nobody waits for; `line` made it.

        Raises:
            WorkerLostError: the connection has ended.
        """

    def take_drops(self) -> tuple[int, ...]:
        """Returns the ids of objects that the next op takes along to be freed."""

    def flush_drops(self) -> None:
        """Frees what nobody points at without waiting for the next op."""

    def draw_seed(self) -> int:
        """Returns a seed for an op that draws random numbers, from torch's generator here."""

    def forget(self, id: int) -> None:
        """Notes that nobody points at object `id` any more."""

    def call(self, packed: bytes, *, via: tuple[Any, ...] = ()) -> Any:
        """Runs a packed op whose results only the worker can tell, and waits for them; returns pointers.

        Raises:
            RemoteError: the op failed. WorkerLostError.
        """

    def backward(
        self,
        roots: list[int],
        given: list[int | None],
        retain_graph: bool,
        create_graph: bool,
        inputs: list[int] | None,
        foreseen: Mapping[int, Spec] | None = None,
    ) -> None:
        """Starts a backward pass from the objects `roots`. Whoever asks for a gradient afterwards waits for it, unless
        `foreseen` says which there will be.
        """


class KnownGradients(Protocol):
    """The gradients of a session's objects, as far as they are known here."""

    @property
    def epoch(self) -> int:
        """Grows when the gradients there may be other tensors than before."""

    @property
    def histories(self) -> Histories:
        """The autograd graph, as far as it is known here."""

    def foresee(self, roots: Sequence[PointerTensor]) -> dict[int, Spec] | None:
        """Returns the gradients that a pass from `roots` leaves; None where only the worker knows."""

    def spec_of(self, pointer: PointerTensor) -> Spec | None:
        """Returns what the gradient of an object looks like; None where it has none."""

    def set(self, id: int, like: Spec | None) -> None:
        """Notes that the client itself set or removed the gradient of object `id`."""


class Ids(Protocol):
    """The ids that objects of this process have there."""

    def holder(self, id: int) -> Handle | None:
        """Returns the handle of object `id`, if somebody here holds one."""

    def leave(self, id: int) -> None:
        """Notes that object `id` stays when its pointers go, or belongs to somebody else now."""


class Objects(Protocol):
    """Objects that are sent, fetched and described."""

    def fetch(self, pointer: PointerTensor, *, delete: bool = True) -> Any:
        """Returns the value behind a pointer, or what it points to; the worker forgets it with `delete`."""

    async def fetch_async(self, pointer: PointerTensor, *, delete: bool = True) -> Any:
        """`fetch`, to be awaited on any loop."""

    def removed(self, handle: Handle, *, published: bool, nbytes: int = 0) -> None:
        """Removes the object of `handle`, whose value has arrived elsewhere."""

    def describe(self, pointer: Pointer, tags: Sequence[str], description: str) -> None:
        """Gives an object tags and a description; tagged ones are published."""

    def tensor_at(self, id: int) -> PointerTensor:
        """Returns a pointer to this client's tensor `id`, which stays there when the pointer goes."""

    async def gradient(self, pointer: PointerTensor) -> PointerTensor | None:
        """Returns ``pointer.grad`` without blocking while a backward pass is under way; to be awaited on any loop."""


class Plans(Protocol):
    """Plans that are sent and taken back."""

    def send(
        self,
        plan: Plan,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        purpose: str = "",
    ) -> PointerPlan:
        """Sends a plan with its state; returns a pointer, at once."""

    def read(self, pointer: PointerPlan) -> PlanRecord:
        """Returns the record of a plan that was found there."""

    def take(self, pointer: PointerPlan) -> tuple[PlanRecord, list[torch.Tensor], bool]:
        """Returns a plan's record, its state, and whether it is in training mode; the worker forgets it."""

    async def take_async(self, pointer: PointerPlan) -> tuple[PlanRecord, list[torch.Tensor], bool]:
        """`take`, to be awaited on any loop."""

    def expose_state(self, handle: Handle) -> None:
        """Notes that there are pointers to the state of the plan of `handle`."""

    def state_exposed(self, handle: Handle) -> bool:
        """Returns whether there are, or were, pointers to the state of the plan of `handle`."""


class Moves(Protocol):
    """Objects that go from worker to worker. A pointer follows its object in place, and is returned."""

    def move(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """Moves an object to the worker `to`."""

    async def move_async(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """`move`, to be awaited on any loop."""

    async def move_plan_async(self, pointer: PointerPlan, to: Any) -> PointerPlan:
        """Moves a plan to the worker `to`; to be awaited on any loop."""

    def hand_over(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """Makes the worker `to` hold a pointer to the object; returns a pointer to that."""

    async def hand_over_async(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """`hand_over`, to be awaited on any loop."""

    async def claim(self, ids: list[int], token: str) -> None:
        """Takes over objects that were handed to whoever shows `token`; on planrt's loop."""

    async def remote_get_async(self, pointer: PointerTensor) -> PointerTensor:
        """Brings what the pointer there points to, there; to be awaited on any loop."""
