"""``planrt sum-keys``: the keys with which workers sign their part in secure aggregations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planrt.errors import OptionError
from planrt.workers.serving.sum_keys import read_key, read_peers, write_key

New = Callable[[Any, str, Callable[[argparse.Namespace], int], str], Any]
"""Makes a command of a name, an action and a help text."""


def register(commands: Any, new: New) -> None:
    """Puts the commands among those of the command line."""
    help = "make and show the keys with which workers sign in secure aggregations"
    parser = commands.add_parser("sum-keys", help=help, description=f"{help[0].upper()}{help[1:]}.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    making = new(
        actions, "make", _make, "make a worker's key, and print the line that its peers' owners need"
    )
    making.add_argument("name", metavar="NAME", help="the worker, as `planrt serve --id` calls it")
    making.add_argument("--out", metavar="FILE", help="where the key goes (default: NAME-sum-key.pem)")
    showing = new(actions, "show", _show, "print that line again, of a key that is there")
    showing.add_argument("name", metavar="NAME", help="the worker")
    showing.add_argument("--key", metavar="FILE", help="where its key is (default: NAME-sum-key.pem)")
    listing = new(
        actions, "list", _list, "list the workers and keys of a file of peers, as a worker reads it"
    )
    listing.add_argument("file", metavar="FILE", help="the file")


def _make(options: argparse.Namespace) -> int:
    name = _checked(options.name)
    path = options.out or _file_of(name)
    public = write_key(path)
    print(f"{name}: {public}")
    print(
        f"# {path} holds the key: keep it to yourself. The owners of the other workers put the line above into their "
        "files of peers;\n# give it to them yourself, not through the server. Then: "
        f"planrt serve --id {name} --sum-key {path} --sum-peers peers.txt"
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    name = _checked(options.name)
    key = read_key(options.key or _file_of(name))
    print(f"{name}: {key.public_key().public_bytes_raw().hex()}")
    return 0


def _list(options: argparse.Namespace) -> int:
    for name, public in read_peers(options.file).items():
        print(f"{name}: {public.hex()}")
    return 0


def _file_of(name: str) -> Path:
    if "/" in name or "\\" in name or name.startswith("."):
        raise OptionError(f"{name!r} makes no name of a file: say where the key is, with --out or --key")
    return Path(f"{name}-sum-key.pem")


def _checked(name: str) -> str:
    if not (1 <= len(name) <= 200 and name.isprintable() and name == name.strip()) or name[0] == "#":
        raise OptionError(f"{name!r:.80} is no name of a worker: write what `planrt serve --id` says")
    return name
