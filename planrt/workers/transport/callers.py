"""Who may open a connection: programs, and web pages that the owner named. No I/O.

A browser lets any page connect to any address that the browser's machine can reach, a worker on loopback too, and says
which page it was in the header ``Origin`` (RFC 6455, sections 4.1 and 10.2). planrt's clients are programs and send
none. A page of a name that its owner points to 127.0.0.1 (DNS rebinding) is of one origin with the worker as far as its
browser can tell; the name then stands in ``Host``.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping

from planrt.errors import OptionError


class Callers:
    """A worker's conditions for whoever opens a connection.

    Args:
        host: the address that the worker listens on.
        origins: web pages that may connect, as browsers write them: ``https://dashboard.example``.
        hosts: names by which the worker may be addressed besides IP addresses, ``localhost`` and this machine's name.
        tls: whether it is reached by ``wss://``. Then the certificate says which names are the worker's.

    Raises:
        OptionError: an origin or a host that is none.
    """

    def __init__(
        self, host: str, *, origins: Iterable[str] = (), hosts: Iterable[str] = (), tls: bool = False
    ) -> None:
        self._origins = frozenset(map(_origin, _several(origins, "origins")))
        names = {host, socket.gethostname(), "localhost", *map(_host, _several(hosts, "hosts"))}
        self._hosts = frozenset(name.lower() for name in names)
        self._tls = tls

    def refusal(self, headers: Mapping[str, str]) -> str | None:
        """Returns the reason why a request with these headers is refused; None for one that is welcome."""
        origin = headers.get("Origin")
        if origin is not None and origin.lower() not in self._origins:
            return (
                f"web pages may not connect to this worker, and this one is of {origin[:200]!r}: the worker's owner "
                "may allow it with --allow-origin"
            )
        name = _name_in(headers.get("Host", ""))
        if not self._tls and not _is_address(name) and name not in self._hosts:
            return (
                f"this worker is not called {name[:200]!r}: use its IP address, or let its owner name that host with "
                "--allow-host"
            )
        return None


def check_open(host: str, *, tls: bool, known: bool, insecure: bool) -> None:
    """Raises OptionError where a worker would take requests of other machines without TLS, or of anybody at all.

    Args:
        host: the address that it listens on.
        tls: whether it has a certificate.
        known: whether it can know its callers, by tokens or certificates.
        insecure: whether its owner said that this is to be so.
    """
    if insecure or is_loopback(host) or (tls and known):
        return
    lacks = " and ".join(
        ["a certificate (--tls-cert, --tls-key)"] * (not tls)
        + ["users (--users, or --tls-client-ca)"] * (not known)
    )
    raise OptionError(
        f"other machines reach {host or 'all addresses'}: that needs {lacks}, which `planrt certs` and `planrt users` "
        "make; without, everybody there can read along and take part, if you write --insecure (insecure=True)"
    )


def is_loopback(host: str) -> bool:
    """Returns whether only programs of this machine reach an address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name_in(host: str) -> str:
    """The name in a ``Host`` header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].strip().lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _several(values: Iterable[str], name: str) -> list[str]:
    found = [values] if isinstance(values, str) else list(values)
    if not all(isinstance(one, str) for one in found):
        raise OptionError(f"{name} is a list of strings")
    return found


def _origin(text: str) -> str:
    scheme, found, rest = text.partition("://")
    if not found or scheme not in ("http", "https") or not rest or "/" in rest:
        raise OptionError(f"{text!r} is no origin: write it as browsers do, https://dashboard.example")
    return text.lower()


def _host(text: str) -> str:
    if not text or not all(char.isalnum() or char in "-._" for char in text):
        raise OptionError(f"{text!r} is no name of a host: write worker.example, without a port")
    return text
