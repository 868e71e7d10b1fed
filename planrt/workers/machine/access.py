"""Who may do what with which data, as a worker's owner says in a TOML file. No I/O but reading that.

A table is about one data set, by its key, or about what is published under one tag::

    [scans]                   # a data set
    see = ["ann", "ben"]      # they are told of it
    run = ["ann"]             # and she may train and evaluate on it

    ["#patients"]             # tensors
    run = "*"                 # everybody finds and computes with them, whoever they are
    fetch = ["ann"]           # and she may read them, and what is computed from them
    own = ["eve"]             # and she alone may publish under this tag

Who may fetch may run, and who may run may see. What a table leaves out is for nobody, and what no table is about is as
it is without such a file. ``"*"`` is everybody, also without a token. Nobody sees a data set that it may not see: to it
there is none under that key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from planrt.errors import OptionError, PolicyError
from planrt.toml_files import read_toml
from planrt.workers.machine.labels import Label
from planrt.workers.wire import messages as m

RIGHTS: Final = ("see", "run", "fetch", "own")
EVERYBODY: Final = "*"

_Who: TypeAlias = frozenset[str] | None
"""Users; None for everybody."""


@dataclass(frozen=True, slots=True)
class _Rights:
    see: _Who = frozenset()
    run: _Who = frozenset()
    fetch: _Who = frozenset()
    own: _Who = frozenset()

    def has(self, right: str, user: str | None) -> bool:
        who: _Who = getattr(self, right)
        return who is None or (user is not None and user in who)


class Access:
    """An owner's say over data: name of a data set, or tag -> right -> users, or ``"*"``.

    Raises:
        OptionError: a right that there is not, or users that are none; names the table and the key.
    """

    def __init__(self, tables: Mapping[str, Any] | None = None) -> None:
        self._tables = {name: _rights(name, given) for name, given in (tables or {}).items()}

    @classmethod
    def of(cls, given: Access | Mapping[str, Any] | str | Path | None) -> Access:
        """Returns an access that is given as such, as tables, or as the file that holds them.

        Raises:
            OptionError: the file cannot be read, is no TOML, or holds something else.
        """
        if isinstance(given, Access):
            return given
        if given is None or isinstance(given, Mapping):
            return cls(given)
        return read_toml(given, "access", cls)

    def sees(self, user: str | None, key: str) -> bool:
        """Returns whether a user is told of a data set; None is nobody."""
        rights = self._tables.get(key)
        return rights is None or rights.has("see", user)

    def without_table(self, key: str) -> dict[str, str]:
        """Returns what to tell an owner who has tables, and none about this data set; empty where all is well."""
        if not self._tables or key in self._tables:
            return {}
        return {"tables": ", ".join(sorted(self._tables)), "so": "everybody who may connect may use it"}

    def check_run(self, user: str | None, key: str) -> None:
        """Raises PolicyError unless a user may train and evaluate on a data set."""
        rights = self._tables.get(key)
        if rights is not None and not rights.has("run", user):
            raise PolicyError(
                f"{_shown(user)} may see the data set {key!r}, and not run anything on it", rule="access"
            )

    def finds(self, user: str | None, tags: Sequence[str]) -> bool:
        """Returns whether a user finds, and may compute with, what others published under these tags."""
        return all(tag not in self._tables or self._tables[tag].has("run", user) for tag in tags)

    def label(self, tags: Sequence[str]) -> Label:
        """Returns who may read tensors of the worker's own that have these tags; None for everybody."""
        label: Label = None
        for tag in tags:
            if tag in self._tables and (who := self._tables[tag].fetch) is not None:
                label = who if label is None else label & who
        return label

    def check_publish(self, user: str | None, body: m.Body) -> None:
        """Raises PolicyError if a message would publish something under a tag that is others'."""
        for tag in _tags_of(body) if self._tables else ():
            if tag in self._tables and not self._tables[tag].has("own", user):
                raise PolicyError(f"{_shown(user)} may not publish under the tag {tag!r}", rule="access")


def _rights(name: str, given: Any) -> _Rights:
    if not isinstance(given, Mapping):
        raise OptionError(f"{name!r} is no table: write [{name}], and below it see, run, fetch or own")
    found: dict[str, _Who] = {}
    for right, users in given.items():
        if right not in RIGHTS:
            raise OptionError(f"[{name}]: unknown key {right!r}; known are {', '.join(RIGHTS)}")
        if users == EVERYBODY:
            found[right] = None
        elif isinstance(users, list | tuple) and all(
            isinstance(one, str) and one not in ("", "*") for one in users
        ):
            found[right] = frozenset(users)
        else:
            raise OptionError(
                f'[{name}]: {right} is a list of users, or "*" for everybody, not {users!r:.80}'
            )
    weaker: _Who = frozenset()
    for right in ("fetch", "run", "see"):  # who has one has those before it
        mine = found.get(right, frozenset())
        weaker = None if mine is None or weaker is None else mine | weaker
        found[right] = weaker
    return _Rights(**found)


def _tags_of(body: m.Body) -> list[str]:
    match body:
        case m.Put(items=items):
            return [tag for item in items for tag in item.tags]
        case m.StorePlan(tags=tags) | m.StoreProtocol(tags=tags) | m.Describe(tags=tags):
            return list(tags)
    return []


def _shown(user: str | None) -> str:
    return "nobody" if user is None else f"user {user!r}"
