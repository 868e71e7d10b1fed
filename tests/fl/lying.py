"""Workers that train as they should, and then return something else."""

from __future__ import annotations

import msgspec

from planrt.workers.machine.rounds.training import TrainingOps


def lie(monkeypatch, **liars):
    """``lie(monkeypatch, bob=f)``: bob's answers are ``f(fitted, sent, trained)``, a new (fitted, trained).

    `sent` and `trained` are the entries that training can change, before and after it.
    """
    honest = TrainingOps.fit

    def fit(self, session, body, tensors):
        sent = [tensor.clone() for tensor in tensors]
        fitted, trained = honest(self, session, body, tensors)
        if self._worker_id not in liars:
            return fitted, trained
        return liars[self._worker_id](fitted, [sent[index] for index in fitted.changed], list(trained))

    monkeypatch.setattr(TrainingOps, "fit", fit)


def flipped(times):
    """The update with its sign turned, and so many times as long."""

    def change(fitted, sent, trained):
        return fitted, [
            before - times * (after - before) if after.is_floating_point() else after
            for before, after in zip(sent, trained, strict=True)
        ]

    return change


def with_first(change):
    """The first entry changed."""
    return lambda fitted, sent, trained: (fitted, [change(trained[0]), *trained[1:]])


def saying(**fields):
    """Other figures."""
    return lambda fitted, sent, trained: (msgspec.structs.replace(fitted, **fields), trained)
