"""A workplace that writes down what pointers ask of it: for tests of pointers that need no worker.

``place = RecordedWorkplace()`` and ``pointer = place.pointer(2, 3)``; ``place.ops`` has the ops that were posted, and
``place.asked`` everything else, in order. What asks for an answer gets the next of ``place.answers``.
"""

from __future__ import annotations

from planrt.plans.running.inference import spec
from planrt.workers.pointers.handle import Handle
from planrt.workers.pointers.histories import Histories
from planrt.workers.pointers.tensor import make_pointer
from planrt.workers.wire.objects import contiguous_stride, new_id
from planrt.workers.wire.posted import PostedOp


class RecordedLocation:
    """A worker of which nothing exists but its name."""

    def __init__(self, id, workplace):
        self.id = id
        self.workplace = workplace


class RecordedGradients:
    """Knows the gradients that a test puts into `specs`."""

    def __init__(self):
        self.epoch = 0
        self.histories = Histories()
        self.specs = {}

    def foresee(self, roots):
        return None

    def spec_of(self, pointer):
        return self.specs.get(pointer.id_at_location)

    def set(self, id, like):
        self.epoch += 1
        self.specs[id] = like


class RecordedIds:
    """Remembers which objects stay."""

    def __init__(self):
        self.left = []

    def holder(self, id):
        return None

    def leave(self, id):
        self.left.append(id)


class Recorder:
    """Any part of a workplace: writes calls down, and answers from the list."""

    def __init__(self, name, place):
        self._name, self._place = name, place

    def __getattr__(self, call):
        def asked(*args, **options):
            return self._place.ask(f"{self._name}.{call}", *args, **options)

        def awaited(*args, **options):
            async def answer():
                return asked(*args, **options)

            return answer()

        return awaited if call.endswith("_async") or call in ("gradient", "claim") else asked


class RecordedWorkplace:
    """See `planrt.workers.pointers.workplace.Workplace`."""

    op_bytes = 1 << 19
    halts = True

    def __init__(self, id="bob"):
        self.location = RecordedLocation(id, self)
        self.gradients, self.ids = RecordedGradients(), RecordedIds()
        self.objects, self.plans, self.moves = (Recorder(one, self) for one in ("objects", "plans", "moves"))
        self.why_ended = ""
        self.ops, self.asked, self.answers, self.forgotten, self.drops = [], [], [], [], []
        self.seed = 7

    def pointer(self, *shape, requires_grad=False, via=()):
        """A pointer to a float32 tensor of that shape."""
        import torch

        like = spec(shape, contiguous_stride(shape), torch.float32, requires_grad, True)
        return make_pointer(Handle(self.location, new_id(), via), like)

    def ask(self, what, *args, **options):
        """Writes a call down; the next answer, None where there is none."""
        self.asked.append((what, args, options))
        return self.answers.pop(0) if self.answers else None

    def post_op(self, packed, line=None):
        self.ops.append(PostedOp.unpack(packed))

    def take_drops(self):
        taken, self.drops = tuple(self.drops), []
        return taken

    def flush_drops(self):
        self.ask("flush_drops")

    def draw_seed(self):
        return self.seed

    def forget(self, id):
        self.forgotten.append(id)

    def call(self, packed, *, via=()):
        return self.ask("call", PostedOp.unpack(packed), via=via)

    def backward(self, *args):
        self.ask("backward", *args)
