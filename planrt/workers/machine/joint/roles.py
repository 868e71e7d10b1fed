"""A party's part of each step of a joint run: how its table and its model take part, and what is kept. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from planrt.errors import AlignmentError, JointError, PlanrtError, PolicyError
from planrt.sharing.columns import linear, shared
from planrt.sharing.columns.intersection import MAX_IDS, align, intersect
from planrt.sharing.columns.steps import Role, Send, take_one
from planrt.workers.machine.joint.networks import SplitOwner
from planrt.workers.machine.joint.owners import AlignedTable, LinearOwner, Model, linear_terms, shared_terms
from planrt.workers.machine.joint.run import Run, StepRefusedError
from planrt.workers.wire import messages as m

Told = Callable[[str, int, bool], None]
"""Called for each decryption, with the party's name, the number of ciphertexts, and whether it is refused."""


def role_of(run: Run, body: m.WorkJoint, told: Told) -> Role:
    """Returns this party's part of a step.

    Raises:
        JointError: another step comes next.
    """
    table, model = run.table, run.model
    if body.step in ("align", "resume"):
        run.begin_anew()
    if body.step == "align":
        return _align(run) if table is not None else _hold(run, told)
    if body.step == "resume":
        return _resume(run, body.epoch, told)
    if body.step == "epoch":
        limit = run.about.model.epochs if run.about.model is not None else 0
        if body.epoch != run.epochs or body.epoch >= limit:
            raise JointError(
                f"epoch {body.epoch} is not the next one: {run.epochs} of at most {limit} are done"
            )
        if run.holder is not None:
            return run.holder.epoch(body.epoch)
        if model is not None:
            return model.epoch(body.epoch)
    elif table is None:
        return _nothing()
    elif body.step == "release" and isinstance(model, LinearOwner):
        return model.release()
    elif body.step != "release" and model is not None:
        return _predict(run, table, model, None if body.step == "evaluate" else body.people)
    raise JointError("nothing is aligned yet: the step 'align' comes first")


def _predict(run: Run, table: AlignedTable, model: Model, people: Sequence[Sequence[str]] | None) -> Role:
    """An owner's part of predictions; of an evaluation, where no people are named.

    The owners first tell each other for which rows: who was told other people than the rest would give its part of a
    prediction for somebody to that of somebody else. Where one does not want to, none does, and the run goes on.
    """
    refusal: PlanrtError | None = None
    rows = np.zeros(0, dtype=np.int64)
    try:
        found = table.evaluated() if people is None else table.rows_of(people)
        check_least(run, len(set(found.tolist())), "figures" if people is None else "predictions")
        rows = found
    except (AlignmentError, PolicyError) as error:
        refusal = error
    mine = torch.from_numpy(rows)
    others = [number for number in range(run.about.owners) if number != run.me]
    for other in others:
        yield Send(other, "rows", [mine])
    for other in others:
        theirs = yield from take_one(other, "rows", torch.int64, [None], run.names)
        if not len(theirs) and refusal is None:
            refusal = JointError(f"{run.name_of(other)} does not predict for these people")
        elif len(mine) and len(theirs) and not torch.equal(mine, theirs):
            raise JointError(f"{run.name_of(run.me)} and {run.name_of(other)} were told different people")
    if refusal is not None:
        raise StepRefusedError(refusal)
    if isinstance(model, SplitOwner):
        return (yield from model.predict(rows))
    return (yield from model.predict(rows, evaluate=people is None))


def _nothing() -> Role:
    """The part of who has nothing to do in a step."""
    yield from ()
    return {}


def check_least(run: Run, rows: int, what: str) -> None:
    """Raises PolicyError if something is of fewer rows than the owner's release rules ask for."""
    if rows < run.least:
        raise PolicyError(
            f"{run.name_of(run.me)}: {what} of fewer than {run.least} people: the release rules of its owner ask for "
            "at least so many",
            rule="release",
        )


def _align(run: Run) -> Role:
    """An owner's part of finding who is in all tables, and what follows before the first epoch."""
    table, about = run.table, run.about
    assert table is not None  # noqa: S101 - the caller has looked
    if about.size_only:
        found = yield from intersect(table.keys, 1 - run.me, run.names, size_only=True)
    else:
        found = yield from align(table.keys, run.me, about.owners, run.names, about.seed)
    run.size = int(found["size"])
    check_least(run, run.size, "an intersection")
    if about.model is None:
        yield from _agreed(run, run.size)
        return {"size": run.size}
    table.align(found["rows"])
    return (yield from _begin(run))


def _begin(run: Run) -> Role:
    """Makes an owner's model for the aligned rows, once all owners agree to them."""
    table, about = run.table, run.about
    assert table is not None  # noqa: S101 - it is an owner's
    model = about.model
    assert model is not None  # noqa: S101 - the caller has looked
    size = min(model.batch_size, table.train_rows)
    check_least(run, (table.train_rows - 1) % size + 1, "a batch")
    if isinstance(model, m.SplitTerms):
        run.model = SplitOwner(about, model, table.values, table.labels, table.train_rows)
        yield from _agreed(run, table.train_rows)
    else:
        run.model = LinearOwner(table, model)
        yield from _agreed(run, table.train_rows)
        yield Send(about.owners, "people", [torch.tensor([table.train_rows])])
        yield from run.model.begin()
    return {"size": run.size, "people": table.train_rows}


def _agreed(run: Run, people: int) -> Role:
    """Waits until each owner has seen how many people there are: until then no client is told anything of them.

    Raises:
        JointError: another owner has another number of them.
    """
    others = [number for number in range(run.about.owners) if number != run.me]
    for other in others:
        yield Send(other, "agrees", [torch.tensor([people])])
    yield from _told_of(run, others, "agrees", people)
    return {}


def _told_of(run: Run, owners: Iterable[int], kind: str, people: int | None) -> Role:
    """Hears from owners how many people there are, which is `people` or what the first one says; returns it."""
    for owner in owners:
        said = int((yield from take_one(owner, kind, torch.int64, [1], run.names))[0])
        if people is None:
            people = said
        if said != people:
            raise JointError(
                f"{run.name_of(owner)} says that there are {said} people, where others have {people}: parties train on "
                "the same people"
            )
    return {"people": people}


def _hold(run: Run, told: Told) -> Role:
    """The part in that of who has no table: it learns how many people there are, and makes the key, or seeds."""
    about, model = run.about, run.about.model
    assert isinstance(model, m.LinearTerms | m.SharedTerms)  # noqa: S101 - or there would be none
    people = (yield from _told_of(run, range(about.owners), "people", None))["people"]
    if not 2 <= people <= MAX_IDS:
        raise JointError(f"party {run.names[0]!r} says that {people} people are in all tables")
    if isinstance(model, m.SharedTerms):
        run.holder = shared.Provider(shared_terms(about, model, people))
        yield from run.holder.begin()
        return {}
    run.holder = linear.KeyHolder(linear_terms(about, model, people), list(about.columns), told)
    yield from run.holder.give_key()
    return {}


def _resume(run: Run, epoch: int, told: Told) -> Role:
    """Takes up what this party kept after so many epochs, in place of finding who is in all tables."""
    if run.kept is None or not run.about.resume:
        raise JointError("only a run that was opened to go on takes up what was kept")
    found = run.kept.checked(epoch)
    try:
        size, people = int(found.facts["size"]), int(found.facts["people"])
        losses = [float(one) for one in found.facts["losses"]]
        result: dict[str, Any] = {"size": size, "people": people}
        run.size = size
        if run.table is None:
            yield from _hold(run, told)
            same = run.holder is not None and run.holder.terms.rows == people
        else:
            run.table.align(found.tensors["rows"])
            yield from _begin(run)
            same = run.table.train_rows == people
            if isinstance(run.model, SplitOwner):
                run.model.restore(run.plans, found, epoch)
            elif isinstance(run.model, LinearOwner):
                run.model.restore(found)
    except JointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise JointError(f"{run.name_of(run.me)} has kept something else than a run: {error!r}") from error
    if not same:
        raise JointError("the parties have kept different numbers of people: begin a new run")
    run.epochs, run.losses = epoch, losses
    return {**result, "losses": losses}


def keep(run: Run) -> None:
    """Keeps this party's part, if it is to be kept.

    Raises:
        JointError: it cannot be written.
    """
    if run.kept is None:
        return
    facts: dict[str, Any] = {"size": run.size, "losses": run.losses}
    tensors: dict[str, torch.Tensor] = {}
    if run.table is None:
        facts["people"] = 0 if run.holder is None else run.holder.terms.rows
    else:
        facts["people"] = run.table.train_rows
        tensors["rows"] = run.table.rows
    if run.model is not None:
        more, state = run.model.captured()
        facts |= more
        tensors |= state
    run.kept.write(run.epochs, facts, tensors)
