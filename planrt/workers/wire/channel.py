"""What is known of a connection before anything is said on it. No I/O."""

from __future__ import annotations

from dataclasses import dataclass


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
    proof: str = ""
    """What that process gave the client as the worker's own proof, to be passed on."""
    sibling: bool = False
    """Whether it comes from another process of the same worker, which that process has joined to this one."""
