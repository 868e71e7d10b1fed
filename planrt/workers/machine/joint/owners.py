"""One owner's table in a joint run: its keys, its aligned rows, and the model that is trained on them. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from typing import Any, Final

import numpy as np
import torch

from planrt.errors import AlignmentError, DataError, JointError
from planrt.serde.checkpoints import Checkpoint
from planrt.sharing.columns import descent, ids, linear, regression, shared
from planrt.sharing.columns.steps import Role, Send, Turn, take_one
from planrt.sharing.columns.table import Table
from planrt.workers.machine.joint.networks import SplitOwner
from planrt.workers.machine.joint.terms import CLIENT
from planrt.workers.wire import messages as m

Array = np.ndarray[Any, Any]
_LARGEST: Final = 1e100
_EPSILON: Final = float(np.finfo(np.float64).eps)
_BYTES_OF_KEY: Final = 200
"""What a row takes at most beside its key: the points that it is compared as, parcels of them, and its place."""


class AlignedTable:
    """A table as a joint run sees it: who its rows are about, and from `align` on the rows of people in all tables.

    Raises:
        DataError: an id column that is not there or has duplicates, a column that is not there, holds text, or has
            missing values; names the party and the column.
    """

    def __init__(self, table: Table, about: m.OpenJoint) -> None:
        self.about = about
        self.name = about.parties[about.number].worker
        missing = [name for name in about.ids if name not in table.ids]
        if missing:
            raise DataError(f"{self.name}: {missing[0]!r} is no id column; those are {', '.join(table.ids)}")
        self._ids = [(name, table.ids[name]) for name in about.ids]
        self.keys = ids.Keys()
        """Of its rows, from `read_keys` on."""
        self.rows = torch.zeros(0, dtype=torch.int64)
        """Those about people in all tables, in the common order, from `align` on."""
        self._features = table.values(about.features, whose=self.name)
        self._label = table.values([about.label], whose=self.name)[:, 0] if about.label else None
        self.places = ids.Places(self.keys, ())
        """Where a key is among the aligned rows."""
        self.values: Array = np.zeros((0, len(about.features)))
        self.labels: Array | None = None
        self.train_rows = 0
        self.scale, self.shift = 1.0, 0.0
        """Of the label, where it was standardised: label * scale + shift."""

    def read_keys(self) -> Generator[Turn, None, None]:
        """Normalises the ids, a slice of the rows at a time.

        Raises:
            DataError: empty ids, or duplicates; names the party and the column.
        """
        self.keys = yield from ids.keys_in_turns(self._ids, self.about.normalise, whose=self.name)

    @property
    def nbytes(self) -> int:
        """About how many bytes it takes, the aligned rows included."""
        keys = self.keys.nbytes + _BYTES_OF_KEY * len(self.keys)
        return int(2 * self._features.nbytes + (0 if self._label is None else 2 * self._label.nbytes)) + keys

    def digest(self) -> str:
        """Returns a SHA-256 of all that the run sees of the table, in the order of its rows."""
        found = hashlib.sha256(self._features.tobytes())
        found.update(b"" if self._label is None else self._label.tobytes())
        for key in self.keys:
            found.update(len(key).to_bytes(4, "big") + key)
        return found.hexdigest()

    def align(self, rows: torch.Tensor) -> None:
        """Keeps the people in all tables, in the common order; the last of them are held out.

        Raises:
            AlignmentError: too few to train on.
        """
        self.rows = rows
        self.places = ids.Places(self.keys, rows.tolist())
        self.train_rows = len(rows) - int(len(rows) * self.about.holdout)
        if self.train_rows < 2:
            raise AlignmentError(f"only {len(rows)} people are in all tables: too few to train on")
        places = rows.numpy()
        self.values = self._features[places]
        self.labels = None if self._label is None else self._label[places]
        if self.about.standardise:
            self._standardise()

    def _standardise(self) -> None:
        named = [name for name in self.about.features if name not in self.about.as_is]
        for place in map(self.about.features.index, named):
            mean, spread = _spread(
                self.values[: self.train_rows, place], self.about.features[place], self.name
            )
            self.values[:, place] = (self.values[:, place] - mean) / spread
        if self.labels is not None and is_linear(self.about.model):
            self.shift, self.scale = _spread(self.labels[: self.train_rows], self.about.label, self.name)
            self.labels = (self.labels - self.shift) / self.scale

    def rows_of(self, people: Sequence[Sequence[str]]) -> Array:
        """Returns the places of people who are in all tables, by the values of their id columns.

        Raises:
            AlignmentError: somebody is not; says which of the people asked for.
        """
        if any(len(one) != len(self.about.ids) for one in people):
            raise AlignmentError(f"a person is named by {len(self.about.ids)} values, as in the id columns")
        found = []
        for number, one in enumerate(people):
            place = self.places.find(ids.key_of(one, self.about.normalise))
            if place is None:
                raise AlignmentError(
                    f"person {number} of those asked for is not among the people in all tables, as they were when the "
                    "run began: who came later is in a new run"
                )
            found.append(place)
        return np.array(found, dtype=np.int64)

    def evaluated(self) -> Array:
        """Returns the places of the people who were held out; of all, if nobody was."""
        held = np.arange(self.train_rows, len(self.places))
        return held if len(held) else np.arange(self.train_rows)


def _spread(values: Array, column: str, whose: str) -> tuple[float, float]:
    """Mean and standard deviation; of a column that is the same for all 1, so that it becomes 0 and not noise.

    Raises:
        DataError: its values are too large to be squared; names party and column.
    """
    if float(np.abs(values).max()) > _LARGEST:
        raise DataError(
            f"{whose}: column {column!r} has values above {_LARGEST:g}, too large to be standardised: divide them first"
        )
    mean, spread = float(values.mean()), float(values.std())
    noise = _EPSILON * len(values) * abs(mean)  # what rounding leaves of a constant
    return mean, spread if spread > noise else 1.0


def is_linear(model: object) -> bool:
    """Returns whether that is linear regression, whose label is standardised too."""
    if isinstance(model, m.SharedTerms):
        return model.loss == "squares"
    return isinstance(model, m.LinearTerms) and model.model == "linear"


def linear_terms(about: m.OpenJoint, model: m.LinearTerms, rows: int) -> regression.Terms:
    """Returns the facts of a regression on encrypted values that all parties know."""
    return regression.Terms(model.model, *_known(about, model, rows), model.key_bits, model.precision)


def shared_terms(about: m.OpenJoint, model: m.SharedTerms, rows: int) -> descent.Terms:
    """Returns those of a regression on shares."""
    columns = [count + (owner == about.label_owner) for owner, count in enumerate(about.columns)]
    kind: regression.Model = "linear" if model.loss == "squares" else "logistic"
    return descent.Terms(
        kind, *_known(about, model, rows), precision=model.precision, loss_kind=model.loss, columns=tuple(columns),
    )  # fmt: skip


def _known(
    about: m.OpenJoint, model: m.LinearTerms | m.SharedTerms, rows: int
) -> tuple[tuple[str, ...], int, int, int, float, float, int]:
    names = tuple(one.worker for one in about.parties)
    return names, about.label_owner, rows, model.batch_size, model.lr, model.l2, about.seed


class LinearOwner:
    """An owner's side of a regression, over its aligned table."""

    def __init__(self, table: AlignedTable, model: m.LinearTerms | m.SharedTerms) -> None:
        self._table = table
        about, rows = table.about, table.train_rows
        given = (
            about.number, table.values, list(about.features), table.labels, about.label, model.allow_small_batches,
        )  # fmt: skip
        self.about = about
        self.terms: regression.Terms
        self.owner: linear.Owner | shared.Owner
        if isinstance(model, m.SharedTerms):
            on_shares = self.terms = shared_terms(about, model, rows)
            self.owner = shared.Owner(on_shares, *given)
        else:
            self.terms = linear_terms(about, model, rows)
            self.owner = linear.Owner(self.terms, *given)

    def begin(self) -> Role:
        """Takes the key from its holder, or a seed from the provider, and shares its columns."""
        return self.owner.begin() if isinstance(self.owner, shared.Owner) else self.owner.take_key()

    def release(self) -> Role:
        """Has the weights of its columns in the clear, at this owner alone."""
        return (yield from self.owner.release()) if isinstance(self.owner, shared.Owner) else {}

    def epoch(self, epoch: int) -> Role:
        """Trains for one epoch."""
        return self.owner.epoch(epoch)

    @property
    def state(self) -> list[torch.Tensor]:
        """The weights of its columns, float64; of the owner of the labels the intercept last, then scale and shift of
        the label.

        Raises:
            JointError: they are still in shares.
        """
        if isinstance(self.owner, shared.Owner) and not self.owner.is_released:
            raise JointError(
                f"the weights of {self.owner.name} are in shares: the step 'release' comes first"
            )
        found = [torch.from_numpy(self.owner.weights.copy())]
        if self.owner.labels is not None:
            found.append(torch.tensor([self._table.scale, self._table.shift], dtype=torch.float64))
        return found

    def captured(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns what is kept of it: plain facts, and tensors."""
        return {}, {"weights": torch.from_numpy(self.owner.weights.copy())}

    def restore(self, kept: Checkpoint) -> None:
        """Takes over what was kept.

        Raises:
            ValueError: it is of another model.
        """
        weights = kept.tensors["weights"].numpy()
        if weights.shape != self.owner.weights.shape:
            raise ValueError(f"weights of shape {weights.shape}")
        self.owner.weights = weights.copy()

    def predict(self, rows: Array, *, evaluate: bool = False) -> Role:
        """Gives its part of the predictions to who may have them; there they are added up.

        To `evaluate`, they go to the owner of the labels, which gives the loss (and of a logistic model, accuracy).
        """
        yield from self.release()
        about, names = self.about, self.terms.names
        receiver = about.label_owner
        if about.predictions_to != CLIENT and not evaluate:
            receiver = names.index(about.predictions_to)
        mine = torch.from_numpy(self.owner.scores(rows))
        label_scale = torch.tensor([self._table.scale, self._table.shift], dtype=torch.float64)
        if about.number != receiver:
            yield Send(receiver, "part of a prediction", [mine])
            if self.owner.labels is not None:
                yield Send(receiver, "scale of the label", [label_scale])
            return {}
        for other in range(about.owners):
            if other != about.number:
                mine = mine + (
                    yield from take_one(other, "part of a prediction", torch.float64, [len(rows)], names)
                )
                if other == about.label_owner:
                    label_scale = yield from take_one(other, "scale of the label", torch.float64, [2], names)
        if self.terms.model == "logistic":
            found: dict[str, Any] = {"predictions": torch.sigmoid(mine)}
        else:
            found = {"predictions": mine * label_scale[0] + label_scale[1]}
        if evaluate:
            found |= self._figures(found["predictions"], mine, rows, label_scale)
        return found

    def _figures(
        self, predictions: torch.Tensor, scores: torch.Tensor, rows: Array, scale: torch.Tensor
    ) -> dict[str, Any]:
        labels = self.owner.labels
        if labels is None:
            raise JointError("only the owner of the labels evaluates")
        truth = torch.from_numpy(labels[rows])
        if self.terms.model == "linear":
            loss = torch.nn.functional.mse_loss(predictions, truth * scale[0] + scale[1])
            return {"loss": float(loss), "people": len(rows)}
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, truth)
        right = ((scores > 0) == (truth > 0.5)).double().mean()
        return {"loss": float(loss), "accuracy": float(right), "people": len(rows)}


Model = LinearOwner | SplitOwner
