"""``python -m fuzz.policies --tries N --seed S``: what an owner gives a worker, changed and made up.

Policies, tables of access, files of users, lists of denied certificates, certificates and keys, the record of
decisions, and options of `planrt certs` and `planrt users`. Each is read as a worker or a command reads it at its
start, or refused in words that a terminal can show; a policy that was read can be shown and has a version.

Exit codes: 0 nothing found, 1 findings, 2 wrong options.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

from fuzz.changes import changed_bytes, changed_text, changed_value
from fuzz.reading import Try, Wrong, main
from planrt.cli import main as planrt
from planrt.errors import ApprovalError, OptionError
from planrt.plans.policy.approvals import Approvals, Asking
from planrt.plans.policy.rules import Policy
from planrt.workers.machine.access import Access
from planrt.workers.machine.handshakes import Users
from planrt.workers.serving import users_file
from planrt.workers.transport.tls import DenyList, client_tls, server_tls

_POLICY: Final = Path(__file__).parent.parent / "examples" / "hospital_policy.toml"
_ACCESS: Final = """[scans]
see = ["ann", "ben"]
run = ["ann"]
["#patients"]
run = "*"
fetch = ["ann"]
own = ["eve"]
"""
_VALUES: Final = (
    "0", "1", "-1", "9" * 30, "1e400", "nan", "inf", "-0.0", "true", '"none"', '""', '"1 MiB"', '"1e9 GiB"', '"-1 B"',
    '"' + "9" * 400 + ' TiB"', '"1.5.5 GiB"', "[]", '["*"]', '["nn.functional.*"]', '["["]', '["' + "*" * 60 + '"]',
    '["' + "a*" * 40 + 'b"]', "[1]", "[[]]", "{}", "{a = 1}", "1979-05-27", '"open"', '"\\u202e"', '"\\u0000"',
    "'''x'''", "0x10", "[" * 2_000, "{a=" * 2_000, '["' + "0" * 64 + '"]', "[" + '"*",' * 5_000 + "]",
)  # fmt: skip
"""Values as TOML writes them."""


def draws(rng: random.Random, folder: Path) -> Try:
    """A file or options, and what reads them."""
    drawing = rng.choice(
        (_policy, _policy, _policy_values, _access, _users, _denied, _certificate, _record, _command)
    )
    return drawing(rng, folder)


# Policies


def _policy(rng: random.Random, folder: Path) -> Try:
    text = _POLICY.read_text(encoding="utf-8")
    if rng.random() < 0.5:
        text = _assigned(rng, text)
    if rng.random() < 0.6:
        text = changed_text(rng, text, _ACCESS)
    path = _written(folder, rng, text)

    def read() -> None:
        _used(Policy.from_file(path))

    return Try("a policy", read, (OptionError,))


def _assigned(rng: random.Random, text: str) -> str:
    """A TOML text in which some keys have other values, or are new."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        key = (
            lines[at].partition("=")[0].strip()
            if "=" in lines[at]
            else rng.choice(("x", "release", '""', "a.b"))
        )
        lines[at] = f"{key} = {rng.choice(_VALUES)}"
    return "\n".join(lines)


def _policy_values(rng: random.Random, folder: Path) -> Try:
    values = changed_value(rng, _known_policy())
    return Try("values of a policy", lambda: _of_values(values), (OptionError,))


@cache
def _known_policy() -> dict[str, Any]:
    import tomllib

    return tomllib.loads(_POLICY.read_text(encoding="utf-8"))


def _of_values(values: Any) -> None:
    if isinstance(values, dict):
        _used(Policy.from_values({str(key): value for key, value in values.items()}))


def _used(policy: Policy) -> None:
    if not str(policy).replace("\n", "").isprintable():
        raise Wrong("a policy is shown with characters that no terminal can show")
    if len(policy.version) != 12 or not policy.allowed_ops <= Policy().allowed_ops:
        raise Wrong("a policy allows what is on no table")


# Files of names and secrets


def _access(rng: random.Random, folder: Path) -> Try:
    text = _assigned(rng, _ACCESS) if rng.random() < 0.5 else changed_text(rng, _ACCESS)
    path = _written(folder, rng, text)

    def read() -> None:
        access = Access.of(path)
        for user in (None, "ann", "", "nobody"):
            access.sees(user, "scans")
            access.finds(user, ["#patients"])
        access.label(["#patients"])

    return Try("an access table", read, (OptionError,))


@cache
def _known_users() -> str:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "users"
        for user in ("ann", "ben"):
            users_file.add(path, user, f"a token of {user}, long enough")
        return path.read_text(encoding="utf-8") + "old: a token in clear, as they were\n"


def _users(rng: random.Random, folder: Path) -> Try:
    text = changed_text(rng, _known_users())
    path = _written(folder, rng, text)
    mode = rng.choice((0o600, 0o600, 0o600, 0o400, 0o644, 0o620, 0))
    path.chmod(mode)

    def read() -> None:
        found = users_file.read(path)
        if mode & 0o077:
            raise Wrong("a file that others may read was read")
        users = Users(found.users)
        users.find("somebody")
        if "token" in repr(found):
            raise Wrong("a file of users shows what is in it")

    return Try("a users file", read, (OptionError,))


def _denied(rng: random.Random, folder: Path) -> Try:
    text = changed_text(rng, f"# who\n{'0a' * 32}\n{':'.join(['AB'] * 32)}  # lost\n")
    path = _written(folder, rng, text)
    return Try("a list of denied certificates", lambda: DenyList(path).denies(b"x"), (OptionError,))


@cache
def _known_certificates() -> Path:
    """A folder with an authority, a worker's certificate and a user's."""
    folder = Path(tempfile.mkdtemp(prefix="planrt-fuzz-"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = planrt(["certs", "make", "--dir", str(folder), "--worker", "alice", "--user", "ann"])
    if code:
        raise RuntimeError(said.getvalue())
    return folder


def _certificate(rng: random.Random, folder: Path) -> Try:
    known = _known_certificates()
    mine = Path(tempfile.mkdtemp(dir=folder))
    for one in known.iterdir():
        if one.is_file():
            shutil.copy2(one, mine)
    names = sorted(one.name for one in mine.iterdir())
    path = mine / rng.choice(names)
    match rng.randrange(4):
        case 0:
            path.write_bytes((mine / rng.choice(names)).read_bytes())
        case 1:
            path.unlink()
        case _:
            path.write_bytes(changed_bytes(rng, path.read_bytes()))
    cert, key = mine / "alice.pem", mine / rng.choice(("alice-key.pem", "alice-key.pem", "ann-key.pem"))
    ca = rng.choice((None, mine / "ca.pem", mine / "ann.pem"))

    def read() -> None:
        server_tls(cert, key, client_ca=ca)
        client_tls(mine / "ca.pem", mine / "ann.pem", mine / "ann-key.pem")
        shutil.rmtree(mine)

    return Try("certificates", read, (OptionError,))


# The record of decisions


def _record(rng: random.Random, folder: Path) -> Try:
    mine = Path(tempfile.mkdtemp(dir=folder))
    approvals = Approvals(mine)
    plans = [f"{number:x}" * 64 for number in range(3)]
    for plan in plans[:2]:
        approvals.approve(plan, by="owner", why="it is an average")
    approvals.deny(plans[0], by="owner", why="no longer")
    files = sorted(one for one in mine.rglob("*") if one.is_file() and one.stat().st_size)
    path = rng.choice(files)
    match rng.randrange(5):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(b"[" * rng.choice((10, 100_000)))
        case 2:
            lines = path.read_bytes().splitlines(keepends=True)
            rng.shuffle(lines)
            path.write_bytes(b"".join(lines))
        case _:
            path.write_bytes(changed_bytes(rng, path.read_bytes()))
    asking = Asking(user=rng.choice(("ann", "")), purpose="why", data=("scans",))

    def read() -> None:
        fresh = Approvals(mine)
        for plan in plans:
            fresh.status(plan)
        fresh.decisions()
        fresh.pending()
        fresh.askings(plans[2])
        fresh.asked(plans[2], asking)
        fresh.approve(plans[2], by="owner", why="fine")
        shutil.rmtree(mine)

    return Try("a record of decisions", read, (ApprovalError,))


# Commands


_WORDS: Final = (
    "", "a", "../x", "/etc/x", "a b", "a=b", "alice", "ca", "-x", "x" * 300, "é", "\u202e", "alice=", "alice=,",
    "a=999.1.1.1", "alice=::1,localhost", "alice=*.x", "a=" + "h" * 300, "0", "-1", "399", "9" * 30, "nan", "\x1b[2J",
    "a\nb", ".", "~",
)  # fmt: skip
_FORMS: Final = (
    ("certs", "make", "--worker", "?"), ("certs", "make", "--user", "?"),
    ("certs", "make", "--user", "ann", "--days", "?"),
    ("certs", "renew", "?"), ("certs", "list"), ("certs", "deny", "?"), ("certs", "?"), ("users", "list", "?"),
    ("users", "remove", "?", "?"), ("users", "?", "?"), ("users", "convert", "?"), ("pending", "?"), ("deny", "?"),
    ("approve", "?"),
)  # fmt: skip
"""Commands; what is ``?`` is drawn."""


def _command(rng: random.Random, folder: Path) -> Try:
    mine = Path(tempfile.mkdtemp(dir=folder))
    words = [rng.choice(_WORDS) if word == "?" else word for word in rng.choice(_FORMS)]
    words = [word.replace("\0", "") for word in words]

    def read() -> None:
        said, errors = io.StringIO(), io.StringIO()
        before = os.getcwd()
        os.chdir(mine)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
                code = planrt(words)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            os.chdir(before)
            shutil.rmtree(mine)
        text = errors.getvalue()
        if "Traceback" in text or code not in (0, 1, 2):
            raise Wrong(f"{words!r} ended with {code}: {text[-200:]}")
        if code and not text.strip():
            raise Wrong(f"{words!r} ended with {code} and no word")
        if not (text + said.getvalue()).replace("\n", "").replace("\t", "").isprintable():
            raise Wrong(f"{words!r} showed what no terminal can: {text[:200]!a}")
        if code:
            raise OptionError(text.strip().splitlines()[-1])

    return Try("a command", read, (OptionError,))


def _written(folder: Path, rng: random.Random, text: str) -> Path:
    path = folder / "given"
    path.unlink(missing_ok=True)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(changed_bytes(rng, data) if rng.random() < 0.1 else data)
    path.chmod(0o600)
    return path


if __name__ == "__main__":
    sys.exit(main("fuzz.policies", __doc__ or "", draws))
