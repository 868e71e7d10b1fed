"""A worker's objects as its clients see them: sending, posting, fetching, searching. `BaseWorker` inherits this."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Any, Final, Self

import torch

from planrt.errors import LocalError, OptionError, WireError, WorkerLostError
from planrt.loop import on_loop, refuse_to_block, run
from planrt.plans.running.inference import Spec
from planrt.serde.values import decode
from planrt.types import Ref, as_text, map_leaves, plain
from planrt.workers.client.connection import Connection, Outgoing, Reply
from planrt.workers.client.gradients import GradientTable
from planrt.workers.client.object_ids import ids_of
from planrt.workers.pointers.tensor import (
    Handle,
    Pointer,
    PointerTensor,
    alive,
    give_id,
    make_pointer,
    pointer_id,
)
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import check_travels, contiguous, new_id, spec_from_wire
from planrt.workers.wire.posted import Line

COPIED_BYTES = 1 << 16
"""Tensors up to this size are copied and posted; for larger ones `send` waits until their bytes have left."""


kinds: dict[str, Callable[[Any, m.FoundItem], Any]] = {}
"""Kind of object -> what makes a pointer of one that a search found. Later rooms put theirs here."""

_HOMES: Final = {"protocol": "planrt.protocols.pointer"}
"""The modules that do: a worker can hold what this process has not imported yet."""


def maker_of(kind: str) -> Callable[[Any, m.FoundItem], Any] | None:
    """What makes a pointer of an object of that kind; None for tensors, plans, and kinds that nobody knows."""
    if kind in _HOMES:
        import_module(_HOMES[kind])
    return kinds.get(kind)


class RemoteObjects:
    """The part of a worker's client that pointers use."""

    id: str
    _connection: Connection

    def _init_objects(self) -> None:
        self.gradients = GradientTable()
        self.ids = ids_of(self.id)

    @property
    def link_address(self) -> str:
        """Where other workers reach this one."""
        return self._connection.session.address

    # ------------------------------------------------------------------------------- used by pointers

    def post_op(self, packed: bytes, line: Line | None = None) -> None:
        """Posts a packed op; waits only if very many are waiting to be sent."""
        if not self._connection.post_op(packed, line):
            run(self._connection.drained(), instead="await something between so many operations")

    @property
    def op_bytes(self) -> int:
        """Longest packed op that the worker takes."""
        return self._connection.op_bytes

    def take_drops(self) -> tuple[int, ...]:
        """Objects that the next op takes along to be freed."""
        return self._connection.take_drops()

    def draw_seed(self) -> int:
        """A seed for an op that draws random numbers, from torch's generator here."""
        return int(torch.randint(2**63 - 1, ()).item())

    def forget(self, id: int) -> None:
        """Nobody points at object `id` any more."""
        self.gradients.forget(id)
        self._connection.drop(id)

    def call(self, packed: bytes, *, via: tuple[Any, ...] = ()) -> Any:
        """Runs a packed op whose results only the worker can tell."""
        body, _ = self._request(m.Call(packed), instead="ops whose results' sizes do not depend on values")
        if not isinstance(body, m.Made):
            raise self._unexpected(body)
        try:
            made = [
                make_pointer(Handle(self, id, via), spec_from_wire(like))  # type: ignore[arg-type]
                for id, like in body.objects
            ]
            return map_leaves(
                decode(body.results), lambda leaf: made[leaf.index] if isinstance(leaf, Ref) else leaf
            )
        except (LocalError, KeyError, IndexError) as error:
            raise self._unexpected(body) from error

    def backward(
        self,
        roots: list[int],
        given: list[int | None],
        retain_graph: bool,
        create_graph: bool,
        inputs: list[int] | None,
        foreseen: Mapping[int, Spec] | None = None,
    ) -> None:
        """A backward pass there; who asks for a gradient afterwards waits for it, unless it was `foreseen`."""
        halts = foreseen is not None
        asked = self._ask(m.Backward(roots, given, retain_graph, create_graph, inputs, halts))
        self.gradients.expect(self._connection, asked, foreseen)

    @property
    def halts(self) -> bool:
        """Whether the worker stops at a backward pass that failed until its client has heard of it."""
        return self._connection.session.versions.halts

    def check_open(self) -> None:
        """Raises WorkerLostError if the connection has ended."""
        self._connection.check_open()

    def _ask(self, body: m.Body, tensors: Sequence[torch.Tensor] = (), *, drops: bool = False) -> Outgoing:
        """Queues a request, from any thread, after everything posted before."""
        return self._connection.enqueue(body, tensors, drops=drops)

    def _request(self, body: m.Body, *, instead: str) -> Reply:
        """A request, from any thread but planrt's own."""
        refuse_to_block(instead)
        self.gradients.settle()  # before anything is asked: what a failed backward pass interrupts must not be lost
        return run(self._connection.finish(self._ask(body)), instead=instead)

    def _unexpected(self, body: object) -> WireError:
        return WireError(
            f"worker {self.id!r} answered with an unexpected {type(body).__name__}", address=self.link_address
        )

    # ------------------------------------------------------------------------------------------ values

    def put(
        self, tensors: Sequence[torch.Tensor], *, allowed: list[str] | None = None, confirm: bool = False
    ) -> list[Handle]:
        """Sends tensors, with their gradients, tags and descriptions, in one message.

        They may change once this returns. `allowed`: the users who may read them, None for everyone. Where a failure
        would lose the values, `confirm` waits until the worker has them.

        Raises:
            UnsupportedTensorError: one that cannot travel. MessageTooLargeError, OptionError: the message cannot be
            sent, and was not. WorkerLostError: the worker is gone. RemoteError: it has no room.
        """
        refuse_to_block("await tensor.async_send(worker)")
        body, payload, handles = self._put_message(tensors, allowed)
        if confirm:
            run(self._connection.finish(self._ask(body, payload)), instead="await tensor.async_send(worker)")
        elif sum(tensor.nbytes for tensor in payload) <= COPIED_BYTES:
            self._connection.post(body, [tensor.clone() for tensor in payload])
        else:
            run(self._connection.send(body, payload), instead="await tensor.async_send(worker)")
        return handles

    @on_loop
    async def put_async(
        self, tensors: Sequence[torch.Tensor], *, allowed: list[str] | None = None, confirm: bool = False
    ) -> list[Handle]:
        """`put`, to be awaited on any loop."""
        body, payload, handles = self._put_message(tensors, allowed)
        if confirm:
            await self._connection.finish(self._ask(body, payload))
        else:
            await self._connection.send(body, payload)
        return handles

    def _put_message(
        self, tensors: Sequence[torch.Tensor], allowed: list[str] | None
    ) -> tuple[m.Put, list[torch.Tensor], list[Handle]]:
        items: list[m.PutItem] = []
        payload: list[torch.Tensor] = []
        handles: list[Handle] = []
        for tensor in tensors:
            check_travels(tensor)
            grad = tensor.grad if tensor.is_leaf else None
            handle = self._new_handle(tensor)
            handles.append(handle)
            tags = list(tensor.__dict__.get("_tags", ()))
            if tags:
                self.ids.leave(handle.id)
            items.append(
                m.PutItem(
                    handle.id, tensor.requires_grad, grad is not None, tags,
                    tensor.__dict__.get("_description", ""), allowed,
                )
            )  # fmt: skip
            payload.append(tensor.detach())
            if grad is not None:
                check_travels(grad)
                payload.append(grad.detach())
                self.gradients.note(handle.id, contiguous(grad))
        return m.Put(items), payload, handles

    # -------------------------------------------------------------------------------- what objects are called

    def _new_handle(self, tensor: torch.Tensor) -> Handle:
        """A handle for what is to be here of `tensor` (or pointer), under its id where that is free. Where it is not,
        because it was sent before, say, the tensor gets a new id, too.
        """
        handle = self.handle_called(pointer_id(tensor))
        give_id(tensor, handle.id)
        return handle

    def handle_called(self, wanted: int) -> Handle:
        """A handle for what is to be here under the id `wanted`, or, where that is taken, under another one."""
        handle = Handle(self, new_id())  # type: ignore[arg-type]
        self._connection.post_drop_of(wanted)
        if not self.ids.claim(handle, wanted):
            self.ids.claim(handle, handle.id)
        return handle

    async def settle_drop_of(self, id: int) -> None:
        """Returns when object `id`, if it was to be dropped, is gone."""
        if self._connection.post_drop_of(id):
            await self._connection.request(m.CountObjects())

    def removed(self, handle: Handle, *, published: bool, nbytes: int = 0) -> None:
        """The object of `handle` has arrived elsewhere: it goes here."""
        self.gradients.forget(handle.id)
        with contextlib.suppress(WorkerLostError):  # it went with the connection
            if published:
                self._connection.post(m.Remove([handle.id]))
            else:
                self._connection.drop(handle.id)
                if nbytes > COPIED_BYTES:
                    self._connection.flush_drops()
        self.ids.gone(handle.id)
        handle.alive = False  # and from here on the id is free

    # ------------------------------------------------------------------------------------------- fetching

    def fetch(self, pointer: PointerTensor, *, delete: bool = True) -> Any:
        """The value behind a pointer, or what it points to. The worker keeps it until it has arrived here."""
        refuse_to_block("await pointer.async_get()")
        return run(self.fetch_async(pointer, delete=delete), instead="await pointer.async_get()")

    def begin_fetch(self, pointer: PointerTensor) -> Outgoing:
        """Asks for a value without waiting for it, so that many can be on their way; `end_fetch` waits."""
        refuse_to_block("await pointer.async_get()")
        self.gradients.settle()
        return self._ask(m.Fetch(alive(pointer).id, False))

    def end_fetch(self, pointer: PointerTensor, asked: Outgoing) -> Any:
        """The value that `begin_fetch` asked for. It stays on the worker until `removed` is called."""

        async def end() -> Any:
            return await self._fetched(pointer, *await self._connection.finish(asked), delete=False)

        return run(end(), instead="await pointer.async_get()")

    @on_loop
    async def fetch_async(self, pointer: PointerTensor, *, delete: bool = True) -> Any:
        """`fetch`, to be awaited on any loop."""
        asked = self._ask(m.Fetch(alive(pointer).id, False))  # it removes nothing, and so need not wait
        try:
            await self.gradients.settle_async()
        except BaseException:
            self._connection.forget(asked)
            raise
        return await self._fetched(pointer, *await self._connection.finish(asked), delete=delete)

    async def _fetched(
        self, pointer: PointerTensor, body: m.Body, tensors: list[torch.Tensor], *, delete: bool
    ) -> Any:
        handle = pointer._handle
        if isinstance(body, m.FetchedPointer):
            there = handle.via[0]
            await there._connection.request(m.Claim([body.object], body.token))
            found = make_pointer(Handle(there, body.object, handle.via[1:]), pointer._spec)
            give_id(found, handle.id)
            self.removed(handle, published=False)  # what it pointed to is this client's now
            return found
        if not isinstance(body, m.Fetched) or len(tensors) != 1 + body.has_grad:
            raise self._unexpected(body)
        value = tensors[0]
        if body.requires_grad:
            value.requires_grad_()
        if body.has_grad:
            value.grad = tensors[1]
        if body.tags or body.description:
            value.__dict__["_tags"], value.__dict__["_description"] = tuple(body.tags), body.description
        give_id(value, handle.id)
        if delete:
            self.removed(handle, published=bool(body.tags), nbytes=value.nbytes)
        return value

    # ------------------------------------------------------------------------------------------- finding

    @on_loop
    async def async_search(self, query: str | Sequence[str], *more: str) -> list[Any]:
        """Pointers to this session's objects, tensors and plans, and to published ones, that match every term exactly.

        A term is a tag, an id, or a word of the description.

        Raises:
            OptionError: a term is no string and no number.
        """
        asked = query if isinstance(query, list | tuple | set | frozenset) else [query]
        terms = [_term(one) for one in (*asked, *more)]
        body, _ = await self._connection.finish(self._ask(m.Search(terms), drops=True))
        if not isinstance(body, m.Found):
            raise self._unexpected(body)
        return [self._found(item) for item in body.objects]

    def _found(self, item: m.FoundItem) -> Any:
        if (make := maker_of(item.kind)) is not None:
            return make(self, item)
        if item.spec is None:
            raise self._unexpected(item)
        pointer = make_pointer(Handle(self, item.id, owned=item.snapshot), spec_from_wire(item.spec))  # type: ignore[arg-type]
        pointer.__dict__["_tags"], pointer.__dict__["_description"] = tuple(item.tags), item.description
        return pointer

    def search(self, query: str | Sequence[str], *more: str) -> list[Any]:
        """The blocking form of `async_search`."""
        return run(self.async_search(query, *more), instead="await worker.async_search(...)")

    def request_search(self, query: str | Sequence[str], *more: str, location: RemoteObjects) -> list[Any]:
        """What `location` has: ``me.request_search(["#boston"], location=bob)``."""
        return location.search(query, *more)

    def describe_object(self, pointer: Pointer, tags: Sequence[str], description: str) -> None:
        """Gives an object tags and a description; tagged ones are published."""
        handle = alive(pointer)
        self._connection.post(m.Describe(handle.id, list(tags), description))
        if tags:
            self.ids.leave(handle.id)

    @on_loop
    async def async_gradient(self, pointer: PointerTensor) -> PointerTensor | None:
        """``pointer.grad``, without blocking while a backward pass is under way."""
        await self.gradients.settle_async()
        return pointer.grad  # type: ignore[return-value]

    @on_loop
    async def async_objects_count(self) -> int:
        """How many objects the worker holds for this client."""
        await self.gradients.settle_async()
        body, _ = await self._connection.finish(self._ask(m.CountObjects(), drops=True))
        if not isinstance(body, m.Counted):
            raise self._unexpected(body)
        return body.objects

    def objects_count(self) -> int:
        """The blocking form of `async_objects_count`."""
        return run(self.async_objects_count(), instead="await worker.async_objects_count()")

    @on_loop
    async def async_clear_objects(self) -> Self:
        """Removes every object that this client has there, published ones too."""
        await self.gradients.settle_async()
        await self._connection.finish(self._ask(m.Clear(), drops=True))
        return self

    def clear_objects(self) -> Self:
        """The blocking form of `async_clear_objects`."""
        return run(self.async_clear_objects(), instead="await worker.async_clear_objects()")


def _term(value: Any) -> str:
    """A term of a search, as it is sent."""
    term = plain(value)
    return str(term) if type(term) is int else as_text(term, "a term of a search")


def allowed_users(private: bool, users: Sequence[str] | None) -> list[str] | None:
    """Who may read what is sent with these options; None for everyone.

    Raises:
        OptionError: `users` is no list of strings, or given together with `private`.
    """
    if isinstance(users, str):
        raise OptionError(f"allowed_users is a list of user names: write [{users!r}]")
    if users is not None and private:
        raise OptionError("private=True means nobody, and allowed_users names some: give one of them")
    if users is not None and not isinstance(users, Collection):
        raise OptionError(f"allowed_users is a list of user names, not {type(users).__name__}")
    if users is not None:
        return [as_text(user, "a name in allowed_users") for user in users]
    return [] if private else None
