"""How a command names a worker, and what it shows of itself to it: options, without torch and NumPy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from planrt.workers.serving.secret_files import TOKEN_VARIABLE, token_from
from planrt.workers.transport.addresses import scheme_of, schemes


def named_address(text: str) -> tuple[str, str]:
    """Parses an option of argparse: ``NAME=URI``."""
    name, equals, uri = text.partition("=")
    if not (name and equals and scheme_of(uri) in schemes()):
        raise argparse.ArgumentTypeError(f"must look like alice=ws://HOST:PORT, got {text!r}")
    return name, uri


@dataclass(frozen=True, slots=True)
class Identity:
    """An identity is what a run shows of itself to its workers, and asks of them."""

    token: str = field(default="", repr=False)
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Identity:
        """Returns the identity that a command's options name.

        Raises:
            OptionError: a token's file cannot be read, or others may read it.
        """
        return cls(token_from(options.token_file), options.ca, options.cert, options.key)

    def shown(self) -> dict[str, Any]:
        """Returns it as arguments of a `WebsocketClientWorker`."""
        return {"token": self.token, "ca": self.ca, "cert": self.cert, "key": self.key}


def add_identity(add: Callable[..., Any]) -> None:
    """Adds the options of an `Identity`: `add` is a parser's `add_argument`."""
    add(
        "--ca",
        metavar="FILE",
        help="authorities (PEM) that the workers' certificates are of, for wss:// addresses",
    )
    add("--cert", metavar="FILE", help="certificate (PEM) to show to workers that ask for one")
    add("--key", metavar="FILE", help="its private key (PEM)")
    add(
        "--token-file",
        metavar="FILE",
        help=f"the token of your user at the workers (or set {TOKEN_VARIABLE})",
    )
