"""A joint run in words, for the owner who is asked for it, and as what all parties must be told alike. No I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import msgspec

from planrt.errors import JointError, OptionError
from planrt.plans.ir.graph import Graph
from planrt.sharing.columns.ids import normaliser
from planrt.workers.wire import messages as m

CLIENT = "client"


def check(about: m.OpenJoint) -> None:
    """Raises unless what a client opens is a joint run.

    Raises:
        JointError, OptionError: it is none; says why.
    """
    names = [one.worker for one in about.parties]
    if len(set(names)) < len(names):
        raise JointError(f"the parties of a joint run are different workers, not {', '.join(names)}")
    holders = 1 if isinstance(about.model, m.LinearTerms | m.SharedTerms) else 0
    if len(names) != about.owners + holders or about.number >= len(names):
        raise JointError(
            f"{len(names)} parties are not {about.owners} owners of tables and {holders} holders of a key "
            "or providers"
        )
    is_owner = about.number < about.owners
    if is_owner != bool(about.dataset) or is_owner != bool(about.ids):
        raise JointError("each owner gives a table with its id columns, and nobody else does")
    if about.label_owner >= about.owners or len(about.columns) != about.owners:
        raise JointError("the label is an owner's, and each owner says how many columns it gives")
    if about.model is not None:
        if is_owner and about.columns[about.number] != len(about.features):
            raise JointError(
                f"{names[about.number]!r} gives {len(about.features)} columns, not the number that is said"
            )
        if (about.number == about.label_owner) != bool(about.label):
            raise JointError("the owner of the label names its column, and nobody else does")
        if about.size_only:
            raise JointError("to train, owners must learn who is in all tables, not only how many")
    if about.size_only and about.owners != 2:
        raise JointError("the size of an intersection is that of two tables")
    if about.predictions_to not in (CLIENT, *names[: about.owners]):
        raise OptionError(f"predictions go to {CLIENT!r} or to an owner, not to {about.predictions_to!r}")
    if isinstance(about.model, m.SplitTerms):
        if len(about.model.widths) != about.owners:
            raise JointError("each owner says how many numbers its part of the network gives")
        if about.predictions_to not in (CLIENT, names[about.label_owner]):
            raise OptionError(
                "the predictions of a split network are made by the owner of the labels: they go there"
            )
    if is_owner and not set(about.as_is) <= set(about.features):
        raise JointError(f"{names[about.number]!r} leaves columns as they are that it does not give")
    if about.resume and not about.keep:
        raise JointError("a run that goes on names what it was kept under")
    if about.keep and isinstance(about.model, m.SharedTerms):
        raise JointError(
            "a regression on shares is not kept: its shares, and what masked them, are for one run"
        )
    if about.keep and about.model is None:
        raise JointError("only a run that trains a model is kept")
    normaliser(about.normalise)


def shared_hash(about: m.OpenJoint, origin: str) -> str:
    """Returns a hash of what all parties must have been told alike; of a run that goes on, they must also have kept it
    from the same one, `origin`."""
    facts = {**_facts(about), "origin": origin}
    for own in ("token", "number", "dataset", "features", "label", "purpose", "as_is"):
        del facts[own]
    facts["ids"] = 0  # how many there are is compared with the keys
    model = facts["model"]
    if isinstance(about.model, m.SplitTerms):
        for own in ("bottom", "bottom_evaluation", "top", "top_evaluation"):
            del model[own]
    return _hash(facts)


def kept_hash(about: m.OpenJoint) -> str:
    """Returns a hash of all that makes a run what it is for this party: one that goes on has the same. Workers may have
    other addresses by then, and it may go on with another learning rate and for more epochs."""
    facts = _facts(about)
    for other in ("joint", "token", "timeout", "purpose", "resume"):
        del facts[other]
    facts["parties"] = [one.worker for one in about.parties]
    if (model := facts["model"]) is not None:
        model.pop("epochs")
        model.get("optimizer_args", model).pop("lr", None)
    return _hash(facts)


def _facts(about: m.OpenJoint) -> dict[str, Any]:
    """All that a party was told of the run itself, defaults included: how the parties talk is no part of that."""
    told = {name: msgspec.to_builtins(getattr(about, name)) for name in about.__struct_fields__}
    del told["tells_waits"]
    return {"type": about.__struct_config__.tag, **told}


def _hash(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def described(about: m.OpenJoint, plans: dict[str, Graph]) -> str:
    """Returns a joint run as its owner reads it, and as a decision about it is filed: without numbers of its own."""
    return "\n".join(_lines(about, plans)) + "\n"


def _lines(about: m.OpenJoint, plans: dict[str, Graph]) -> Iterator[str]:
    names = [f"{one.worker} at {one.address}" for one in about.parties]
    me = about.number
    yield f"joint run of {', '.join(names)}"
    yield f"this worker: {about.parties[me].worker}, " + (
        f"with its table {about.dataset!r}"
        if about.dataset
        else "which hands out correlated randomness"
        if isinstance(about.model, m.SharedTerms)
        else "which makes the key and decrypts masked gradients"
    )
    if about.dataset:
        yield f"id columns: {', '.join(about.ids)}, normalised as {about.normalise!r}"
        others = [name for number, name in enumerate(names[: about.owners]) if number != me]
        learn = "how many people are" if about.size_only else "which of their own people are"
        yield f"{' and '.join(others)} learn how many rows the table has, and {learn} in it too"
    if about.model is not None:
        yield from _model_lines(about, plans)
    but = f", but not {', '.join(about.as_is)}" if about.standardise and about.as_is else ""
    yield f"seed {about.seed}, people held out {about.holdout:g}, standardised here: {about.standardise}{but}"


def _model_lines(about: m.OpenJoint, plans: dict[str, Graph]) -> Iterator[str]:
    model = about.model
    if about.features:
        yield f"columns computed with: {', '.join(about.features)}"
    if about.label:
        yield f"label column: {about.label}"
    if isinstance(model, m.LinearTerms):
        yield (
            f"{model.model} regression on encrypted residuals: {model.epochs} epochs at most, batches of "
            f"{model.batch_size}, learning rate {model.lr:g}, L2 {model.l2:g}, key of {model.key_bits} bits, "
            f"precision {model.precision}, short keys allowed: {model.allow_short_key}, small batches allowed: "
            f"{model.allow_small_batches}"
        )
        yield "owners exchange encrypted values; the key holder sees uniformly masked gradients, and the loss"
    elif isinstance(model, m.SharedTerms):
        kind = "linear" if model.loss == "squares" else f"logistic ({model.loss})"
        yield (
            f"{kind} regression on secret shares: {model.epochs} epochs at most, batches of {model.batch_size}, "
            f"learning rate {model.lr:g}, L2 {model.l2:g}, precision {model.precision}, small batches allowed: "
            f"{model.allow_small_batches}"
        )
        yield (
            "owners exchange shares of their columns and masked values, which tell nothing; the provider sees none of "
            "them, and must not work together with an owner; each owner gets its own weights when they are asked for"
        )
    elif isinstance(model, m.SplitTerms):
        yield (
            f"split network: {model.epochs} epochs at most, batches of {model.batch_size}, {model.optimizer} "
            f"{json.dumps(model.optimizer_args, sort_keys=True)}, noise {model.noise:g}"
        )
        if about.dataset:
            width = model.widths[about.number]
            yield f"the owner of the labels sees {width} numbers that this worker's part gives for each person"
    yield f"the client sees the loss of each epoch; this worker's weights: {about.weights_to_client}"
    if about.dataset:
        yield f"for people who are named, this worker gives its part of a prediction to {about.predictions_to}"
    if about.keep:
        yield (
            f"after each epoch this worker keeps its weights, and who is in all tables, in its folder as {about.keep!r}"
        )
    for hash, plan in plans.items():
        yield f"plan {hash}:\n{plan}"
