"""Plans as files: `save_plan` is `Plan.save`, and `load_plan` reads what it wrote.

The format is that of `planrt.plans.forms.files`.
"""

from __future__ import annotations

import io
from typing import BinaryIO

from planrt.plans.forms.files import MAGIC, AnyPath, PlanFile, read, write
from planrt.plans.ir.record import state_hash
from planrt.plans.plan import Plan
from planrt.serde.objects import register


def save_plan(plan: Plan, path: AnyPath | BinaryIO) -> None:
    """Writes `plan` to a file; see `Plan.save`."""
    state = plan.state_here()
    names = {id(tensor): entry.name for entry, tensor in zip(plan.record.state, state, strict=True)}
    keys = {key: names[id(one)] for key, one in plan.named_state().items() if id(one) in names}
    described = PlanFile(
        plan.record,
        plan.training,
        tuple(plan.tags),
        plan.description,
        state_hash(state),
        keys,
        sum(one.nbytes for one in state),
    )
    write(path, described, state)


def load_plan(path: AnyPath | BinaryIO) -> Plan:
    """Loads the plan that `Plan.save` wrote, on the CPU: to be called, sent, and saved again.

    For example::

        net.save("net.plan")
        again = load_plan("net.plan")
        assert again.hash == net.hash and again.state_hash == net.state_hash

    `path` may be a binary file that is open for reading (`io.BytesIO`): it is read from where it stands to
    its end. It has no Python code, and runs its ops. No code of the file runs, because there is none in it.

    Raises:
        OptionError: no file there, or one that cannot be read.
        PlanFormatError: not a plan file, truncated, altered, or of a newer version.
        OpNotAllowedError: an op that is not on the table of the installed torch.
    """
    found, state = read(path)
    made = Plan.from_record(found.record, state, training=found.training, keys=found.keys)
    if found.tags:
        made.tag(*found.tags)
    return made.describe(found.description)


def _to_bytes(plan: Plan) -> bytes:
    whole = io.BytesIO()
    plan.save(whole)
    return whole.getvalue()


register(Plan, MAGIC, _to_bytes, lambda data: load_plan(io.BytesIO(data)))
