"""``planrt certs``: an authority of one's own, and the certificates of a small federation's workers and
users.

Certificates are for 90 days unless said otherwise, so that one that was lost is soon worth nothing; the
authority's own is for five years. Keys are of the curve P-256, and in files that only their owner may read.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from planrt.command_line import whole_number
from planrt.errors import OptionError
from planrt.workers.serving.secret_files import read_secret, write_secret
from planrt.workers.transport.tls import USER, WORKER

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

DEFAULT_FOLDER: Final = "certs"
AUTHORITY_DAYS: Final = 5 * 365
DAYS: Final = 90
MOST_DAYS: Final = 398
AUTHORITY: Final = "ca"
_HERE: Final = "localhost,127.0.0.1,::1"

New = Callable[[Any, str, Callable[[argparse.Namespace], int], str], Any]
"""Makes a command of a name, an action and a help text."""


def register(commands: Any, new: New) -> None:
    """Puts the commands among those of the command line."""
    help = "make, renew, list and deny the certificates of workers and users"
    parser = commands.add_parser("certs", help=help, description=f"{help[0].upper()}{help[1:]}.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    making = new(actions, "make", _make, "make certificates, and the authority if there is none yet")
    making.add_argument(
        "--worker",
        action="append",
        default=[],
        metavar="NAME[=HOST,...]",
        help=f"a worker, and the host names and IP addresses that it is reached by (default: {_HERE}); repeatable",
    )
    making.add_argument("--user", action="append", default=[], metavar="NAME", help="a user (repeatable)")
    renewing = new(actions, "renew", _renew, "make certificates anew, with the same names and another key")
    renewing.add_argument("names", nargs="*", metavar="NAME", help="whose (default: all)")
    listing = new(actions, "list", _list, "list the certificates, with their ends and fingerprints")
    denying = new(
        actions, "deny", _deny, "put a certificate on the list that `planrt serve --tls-deny` reads"
    )
    denying.add_argument("name", metavar="NAME", help="whose")
    denying.add_argument(
        "--list", default="denied.txt", metavar="FILE", help="the list (default: denied.txt)"
    )
    for one in (making, renewing):
        days = whole_number(at_least=1, at_most=MOST_DAYS)
        one.add_argument("--days", type=days, default=DAYS, help="days that they are good for (%(default)s)")
    for one in (making, renewing, listing, denying):
        one.add_argument(
            "--dir",
            default=DEFAULT_FOLDER,
            metavar="DIR",
            help=f"where they are kept (default: {DEFAULT_FOLDER})",
        )


# The commands


def _make(options: argparse.Namespace) -> int:
    folder = Path(options.dir)
    workers = [_named(text) for text in options.worker]
    names = [name for name, _ in workers] + options.user
    for name in names:
        _check_name(name)
        if name == AUTHORITY or names.count(name) > 1 or (folder / f"{name}.pem").exists():
            raise OptionError(f"{name!r} is taken: use another name, or `planrt certs renew {name}`")
    if not names:
        raise OptionError(
            "name workers and users: planrt certs make --worker alice=alice.example,10.0.0.5 --user ann"
        )
    hosts = {name: _hosts(text) for name, text in workers}
    authority = _Authority(folder, make=True)
    for name, found in hosts.items():
        authority.issue(name, found, options.days)
    for name in options.user:
        authority.issue(name, None, options.days)
    _show_use(folder, hosts, options.user)
    return 0


def _renew(options: argparse.Namespace) -> int:
    authority = _Authority(Path(options.dir))
    names = options.names or authority.names()
    known = {name: authority.read(name) for name in names}  # all are looked at before one is written
    for name, certificate in known.items():
        authority.issue(name, _hosts_in(certificate), options.days, again=True)
        print(f"{name}: until {authority.read(name).not_valid_after_utc:%Y-%m-%d}")
    print("Start the workers again that use these; certificates of before are good until their own end.")
    return 0


def _list(options: argparse.Namespace) -> int:
    authority = _Authority(Path(options.dir))
    now = datetime.now(UTC)
    for name in (AUTHORITY, *authority.names()):
        certificate = authority.read(name)
        end = certificate.not_valid_after_utc
        state = "EXPIRED" if end < now else f"{(end - now).days} days"
        kind = "authority" if name == AUTHORITY else "user" if _hosts_in(certificate) is None else "worker"
        print(f"{name}  {kind}  until {end:%Y-%m-%d} ({state})  {_fingerprint(certificate)}")
    return 0


def _deny(options: argparse.Namespace) -> int:
    certificate = _Authority(Path(options.dir)).read(options.name)
    path = Path(options.list)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(f"{before}{_fingerprint(certificate)}  # {options.name}\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}") from None
    print(
        f"{path} denies the certificate of {options.name}; workers started with --tls-deny {path} see that at once"
    )
    return 0


def _show_use(folder: Path, workers: Sequence[str] | dict[str, Any], users: Sequence[str]) -> None:
    ca = folder / f"{AUTHORITY}.pem"
    print(f"{ca} is the authority: everybody gets it. Keep {folder / f'{AUTHORITY}-key.pem'} to yourself.")
    for name in workers:
        print(
            f"planrt serve --id {name} --tls-cert {folder / name}.pem --tls-key {folder / name}-key.pem",
            end="",
        )
        print(f" --tls-client-ca {ca} --peer-ca {ca}" if users else " --users users.txt")
    for name in users:
        pair = f'cert="{folder / name}.pem", key="{folder / name}-key.pem"'
        print(f'{name}: WebsocketClientWorker("NAME", uri="wss://HOST:PORT", ca="{ca}", {pair})')


# What the files hold


class _Authority:
    """An authority and what it has issued, in the files of a folder."""

    def __init__(self, folder: Path, *, make: bool = False) -> None:
        self._folder = folder
        path = folder / f"{AUTHORITY}-key.pem"
        if make and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._key = _new_key()
            self._write(AUTHORITY, self._self_signed(), self._key)
            return
        if not path.exists():
            raise OptionError(f"{folder} holds no authority: make one with planrt certs make")
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(read_secret(path).encode(), None)
        except (ValueError, TypeError):
            raise OptionError(f"{path} holds no private key in PEM without a password") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise OptionError(f"{path} is no key that planrt certs made")
        self._key = key
        if self.read(AUTHORITY).public_key() != self._key.public_key():
            raise OptionError(f"{path} is not the key of {folder / f'{AUTHORITY}.pem'}")

    def names(self) -> list[str]:
        found = sorted(path.name.removesuffix("-key.pem") for path in self._folder.glob("*-key.pem"))
        return [name for name in found if name != AUTHORITY]

    def read(self, name: str) -> x509.Certificate:
        from cryptography import x509

        path = self._folder / f"{name}.pem"
        try:
            return x509.load_pem_x509_certificate(path.read_bytes())
        except OSError:
            raise OptionError(f"{self._folder} holds no certificate of {name!r}") from None
        except ValueError:
            raise OptionError(f"{path} holds no certificate in PEM") from None

    def issue(
        self, name: str, hosts: Sequence[x509.GeneralName] | None, days: int, *, again: bool = False
    ) -> None:
        """Makes the certificate of a worker that is reached by `hosts`, or of a user."""
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID as Use

        key = _new_key()
        own = self.read(AUTHORITY)
        said = f"{USER if hosts is None else WORKER}{name}"
        names = [*(hosts or ()), x509.UniformResourceIdentifier(said)]
        uses = [Use.CLIENT_AUTH] if hosts is None else [Use.SERVER_AUTH, Use.CLIENT_AUTH]
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = (
            _builder(name if hosts is None else said, own.subject, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(by, critical=False)
        )
        self._write(name, made, key, again=again)

    def _self_signed(self) -> x509.CertificateBuilder:
        from cryptography import x509

        subject = _name(f"planrt authority {self._folder.name}"[:64])
        return (
            _builder(subject, subject, self._key, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
        )

    def _write(
        self,
        name: str,
        certificate: x509.CertificateBuilder,
        key: EllipticCurvePrivateKey,
        *,
        again: bool = False,
    ) -> None:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        shown = certificate.sign(self._key, SHA256()).public_bytes(Encoding.PEM)
        write_secret(self._folder / f"{name}-key.pem", secret.decode(), replace=again)
        path = self._folder / f"{name}.pem"
        write_secret(path, shown.decode(), replace=again)
        path.chmod(0o644)


def _builder(
    subject: str | x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject) if isinstance(subject, str) else subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=10))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _fingerprint(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.hashes import SHA256

    return certificate.fingerprint(SHA256()).hex()


def _hosts_in(certificate: x509.Certificate) -> list[x509.GeneralName] | None:
    """What a worker is reached by, as its certificate says; None for a user's."""
    from cryptography import x509

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if any(text.startswith(USER) for text in names.get_values_for_type(x509.UniformResourceIdentifier)):
        return None
    return [name for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


# What options mean


def _named(text: str) -> tuple[str, str]:
    name, equals, hosts = text.partition("=")
    return name, hosts if equals else _HERE


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,40}", name) or name.endswith("-key"):
        raise OptionError(f"{name!r:.80} is no name here: write up to 41 letters, digits, and . _ @ -")


def _hosts(text: str) -> list[x509.GeneralName]:
    """The host names and addresses of ``alice.example,10.0.0.5``."""
    from cryptography import x509

    found: list[x509.GeneralName] = []
    for one in text.split(","):
        host = one.strip()
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
            continue
        except ValueError:
            pass
        if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9._-]{0,250}[A-Za-z0-9])?", host):
            raise OptionError(
                f"{host!r:.80} is no host name or IP address: write alice=alice.example,10.0.0.5"
            )
        found.append(x509.DNSName(host))
    return found
