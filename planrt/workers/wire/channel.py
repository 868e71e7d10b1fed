"""What is known of a connection before anything is said on it. No I/O."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache


@lru_cache(maxsize=1024)
def caller(host: str) -> str:
    """Returns what counts as one caller of those at address `host`.

    What one machine has many addresses of is one: of IPv6 the network of 64 bits, as that is what it is given, and all
    of 127.0.0.0/8. So nobody has the bounds of an address as often as there are addresses.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 6 and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_loopback:
        return "127.0.0.1"
    return (
        str(ipaddress.ip_network((int(address), 64), strict=False)) if address.version == 6 else str(address)
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """A ticket that was proved on a connection, to another process of the worker."""

    ticket: str
    user: str
    """Who proved it; ``""`` for nobody."""
    proof: str
    """The worker's own, to be passed on."""


@dataclass(frozen=True, slots=True)
class Channel:
    """What a connection came with. In one process, and in tests of the machine, nothing."""

    host: str = ""
    """The address at its other end, without a port; ``""`` within one process."""
    binding: bytes | None = None
    """Of a connection over TLS: what ties a proof to it, the SHA-256 of the server's certificate."""
    user: str | None = None
    """Who the certificate is of that the client showed; None where it showed none. Of a connection that another process
    of the worker has accepted: whom it found the client to be."""
    certificate: str = ""
    """The SHA-256 of that certificate, in hexadecimal digits; ``""`` where none was shown."""
    proof: str = ""
    """What that process gave the client as the worker's own proof, to be passed on."""
    sibling: bool = False
    """Whether it comes from another process of the same worker, which that process has joined to this one."""
    shown: Shown | None = None
    """The ticket that was proved to that process."""
