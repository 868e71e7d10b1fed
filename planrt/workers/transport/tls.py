"""TLS at both ends: certificates checked before anything starts, and who a client is by its own.

TLS 1.3 where both sides have it, 1.2 at the least. A client checks its server's certificate, always. A server with a
`client_ca` lets in only who shows a certificate of that authority.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from planrt.errors import OptionError

WORKER: Final = "planrt:worker:"
USER: Final = "planrt:user:"
"""How the certificates that `planrt certs` makes name what they are of, as a URI among their names."""

_Names = Mapping[str, Any]
"""A certificate as `ssl.SSLSocket.getpeercert` tells it."""


class DenyList:
    """Certificates that are let in no longer: a file of SHA-256 fingerprints, one a line, read anew when it changes.

    Raises:
        OptionError: the file cannot be read, or a line is no fingerprint.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int] | None = None
        self._denied: frozenset[str] = frozenset()
        self._read()

    def denies(self, certificate: bytes) -> bool:
        """Whether this certificate (DER) is on the list. One that cannot be read any more denies everybody."""
        try:
            self._read()
        except OptionError:
            return True
        return hashlib.sha256(certificate).hexdigest() in self._denied

    def _read(self) -> None:
        try:
            stat = self._path.stat()
            seen = stat.st_mtime_ns, stat.st_size
            if seen == self._seen:
                return
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"the list of denied certificates {self._path} cannot be read: {error}"
            ) from None
        denied = []
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip().replace(":", "").lower()
            if text and not re.fullmatch("[0-9a-f]{64}", text):
                raise OptionError(
                    f"{self._path}, line {number}: that is no SHA-256 fingerprint of a certificate"
                )
            denied += [text] if text else []
        self._denied, self._seen = frozenset(denied), seen


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server listens with."""

    context: ssl.SSLContext = field(repr=False)
    binding: bytes
    """The SHA-256 of its certificate, to which proofs of tokens are bound."""
    asks_clients: bool
    """Whether only clients with a certificate get in."""
    denied: DenyList | None = None
    until: float | None = None
    """The time at which its certificate expires (seconds, as of `time.time`)."""


def server_tls(
    cert: str | Path | None,
    key: str | Path | None,
    client_ca: str | Path | None = None,
    deny: str | Path | None = None,
) -> ServerTls | None:
    """TLS with that certificate (and chain) and private key, files in PEM; None without. With `client_ca`, a file of
    authorities, clients need a certificate of one of them, which is not on the list `deny`.

    Raises:
        OptionError: one of them is missing, cannot be read or has expired, or they do not fit.
    """
    if cert is None and key is None:
        if client_ca is not None or deny is not None:
            raise OptionError(
                "certificates of clients are for TLS: give the server a certificate and a key, --tls-cert and --tls-key"
            )
        return None
    if cert is None or key is None:
        raise OptionError(
            "TLS takes both a certificate and its private key: --tls-cert and --tls-key (cert_path=, key_path=)"
        )
    if deny is not None and client_ca is None:
        raise OptionError(
            "a list of denied certificates is for those of clients: name their authority, --tls-client-ca (client_ca=)"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, cert, key)
    _check_own(cert, key, servers=True)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _trust(context, client_ca, "client_ca")
    denied = DenyList(deny) if deny is not None else None
    own = certificate_in(cert)
    until = x509.load_der_x509_certificate(own).not_valid_after_utc.timestamp()
    return ServerTls(context, fingerprint(own), client_ca is not None, denied, until)


def client_tls(
    ca: str | Path | None = None, cert: str | Path | None = None, key: str | Path | None = None
) -> ssl.SSLContext:
    """TLS to a worker whose certificate is of an authority in the file `ca`, or of one that the system trusts; `cert`
    and `key` are what the client shows of itself.

    Raises:
        OptionError: one of them is missing, cannot be read or has expired, or they do not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, ca, "ca")
    if (cert is None) != (key is None):
        raise OptionError("a certificate is shown with its key: give both cert= and key=, or neither")
    if cert is not None and key is not None:
        _load(context, cert, key)
        _check_own(cert, key, servers=False)
    return context


def fingerprint(certificate: bytes) -> bytes:
    """The SHA-256 of a certificate (DER)."""
    return hashlib.sha256(certificate).digest()


def certificate_in(path: str | Path) -> bytes:
    """The first certificate of a file in PEM, as DER."""
    text = Path(path).read_text(encoding="ascii", errors="replace")
    found = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
    if found is None:
        raise OptionError(f"{os.fspath(path)!r} holds no certificate in PEM")
    return ssl.PEM_cert_to_DER_cert(found[0])


def is_for_clients(cert: str | Path) -> bool:
    """Returns whether a certificate, a file in PEM, is one that clients show: those of public authorities are for
    servers alone. Its key is not looked at; False for what is no certificate."""
    try:
        extensions = x509.load_der_x509_certificate(certificate_in(cert)).extensions
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    except (OSError, ValueError, OptionError):
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in purposes


def user_of(names: _Names) -> str | None:
    """Whose certificate this is: the user that `planrt certs` named, or else its common name.

    A worker that shows its own is ``planrt:worker:NAME``, which no user is called. None: it names nobody.
    """
    for kind, text in names.get("subjectAltName", ()):
        if kind == "URI" and text.startswith(USER) and text != USER:
            return str(text).removeprefix(USER)
        if kind == "URI" and text.startswith(WORKER):
            return str(text)
    for part in names.get("subject", ()):
        for kind, text in part:
            if kind == "commonName" and text and not text.startswith("planrt:"):
                return str(text)
    return None


def why_not(error: ssl.SSLError, uri: str) -> str:
    """Why there is no TLS connection to `uri`, and what to do about it."""
    said = getattr(error, "verify_message", "") or error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "give the authority that made its certificate, ca=..."
        if "expired" in said:
            hint = "its owner must renew its certificate"
        elif "mismatch" in said or "not valid for" in said:
            hint = "use a name or an address that its certificate is for"
        return f"{uri} shows a certificate that is not trusted ({said}): {hint}"
    if "ALERT" in said and ("CERTIFICATE" in said or "UNKNOWN_CA" in said):
        return f"{uri} does not take your certificate, or none ({said}): show one of the authority that it trusts"
    if said in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"):
        return f"{uri} does not speak TLS: is it served without, at ws://?"
    return f"no TLS connection to {uri}: {said}"


def _load(context: ssl.SSLContext, cert: str | Path, key: str | Path) -> None:
    named = f"certificate {os.fspath(cert)!r} and key {os.fspath(key)!r}"
    for path in (cert, key):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise OptionError(f"{named}: {os.fspath(path)!r} cannot be read ({error.strerror})") from None
    try:
        context.load_cert_chain(os.fspath(cert), os.fspath(key), password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise OptionError(f"{named} do not belong together") from None
        raise OptionError(
            f"{named} are no certificate and its key, in PEM and without a password: {error}"
        ) from None


def _trust(context: ssl.SSLContext, ca: str | Path, option: str) -> None:
    try:
        context.load_verify_locations(cafile=os.fspath(ca))
    except (OSError, ssl.SSLError) as error:
        said = error.strerror or error
        raise OptionError(
            f"{option}={os.fspath(ca)!r}: no certificates in PEM, they cannot be read: {said}"
        ) from None


def _check_own(cert: str | Path, key: str | Path, *, servers: bool) -> None:
    """Raises OptionError if a certificate is out of its time, or not for servers, or not for clients: shakes hands in
    memory with somebody who trusts this certificate and no other.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    for context in (server, client):
        _load(context, cert, key)
        context.verify_mode = ssl.CERT_NONE
    asks = client if servers else server
    asks.verify_mode = ssl.CERT_REQUIRED
    asks.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    asks.load_verify_locations(cadata=certificate_in(cert))
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(here, there), server.wrap_bio(there, here, server_side=True)
    for side in sides * 4:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason
            raise OptionError(f"the certificate {os.fspath(cert)!r} cannot be used: {why}") from None
