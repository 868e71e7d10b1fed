"""``planrt users``: who may prove to be whom, at workers that are started with ``--users FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from planrt.errors import OptionError
from planrt.workers.serving import users_file
from planrt.workers.serving.secret_files import write_secret
from planrt.workers.wire.proofs import is_verifier, new_token

DEFAULT_FILE: Final = "users.txt"

New = Callable[[Any, str, Callable[[argparse.Namespace], int], str], Any]
"""Makes a command of a name, an action and a help text."""


def register(commands: Any, new: New) -> None:
    """Puts the commands among those of the command line."""
    help = "add, list and remove the users of workers"
    parser = commands.add_parser("users", help=help, description=f"{help[0].upper()}{help[1:]}.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    adding = new(actions, "add", _add, "add a user, and show the new token, once")
    adding.add_argument("--out", metavar="FILE", help="write the new token there, readable for you only")
    adding.add_argument(
        "--token-stdin", action="store_true", help="take the token from standard input, in place of a new one"
    )
    removing = new(
        actions, "remove", _remove, "remove a user; workers that run know it until they are started again"
    )
    listing = new(actions, "list", _list, "list the users")
    converting = new(
        actions, "convert", _convert, "keep what proves tokens, in place of the tokens in the file"
    )
    for one in (adding, removing):
        one.add_argument("name", metavar="NAME", help="the user")
    for one in (adding, removing, listing, converting):
        one.add_argument(
            "--users",
            default=DEFAULT_FILE,
            metavar="FILE",
            help=f"the file of users (default: {DEFAULT_FILE})",
        )


def _add(options: argparse.Namespace) -> int:
    if options.token_stdin and options.out is not None:
        raise OptionError("--out is for a new token, and --token-stdin takes one that is there")
    if options.token_stdin:
        token = sys.stdin.readline().rstrip("\r\n")
        users_file.add(options.users, options.name, token)
        print(f"{options.name} may prove the token that you gave; {options.users} holds what checks it")
        return 0
    token = new_token()
    if options.out is not None:
        write_secret(options.out, f"{token}\n")
    try:
        users_file.add(options.users, options.name, token)
    except OptionError:
        if options.out is not None:
            Path(options.out).unlink()
        raise
    if options.out is not None:
        print(f"{options.out} holds the token of {options.name}; {options.users} holds what checks it")
        return 0
    print(token)
    about = f"This is the token of {options.name}, shown once and kept nowhere"
    print(f"{about}: {options.users} holds what checks it.", file=sys.stderr)
    return 0


def _remove(options: argparse.Namespace) -> int:
    users_file.remove(options.users, options.name)
    print(f"{options.name} is removed from {options.users}: start the workers that use it again")
    return 0


def _list(options: argparse.Namespace) -> int:
    found = users_file.read(options.users)
    for name, text in found.users.items():
        print(name if is_verifier(text) else f"{name}  (the token is in the file: planrt users convert)")
    if not found.users:
        print("no users")
    return 0


def _convert(options: argparse.Namespace) -> int:
    converted = users_file.convert(options.users)
    if not converted:
        raise OptionError(f"{options.users} holds no tokens")
    print(f"{options.users} holds what checks the tokens of {', '.join(converted)}, and no tokens")
    return 0
