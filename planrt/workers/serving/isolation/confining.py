"""What a process for clients' work may still do, once it is confined: compute, and talk over the files that it has.

Three parts, each kept by the kernel from then on, with no way back for the process:

* Landlock (`landlock(7)`): no files but those under the folders given, and these to be read only; no TCP, no signals to
  processes outside, no abstract sockets, as far as the kernel's version of it goes.
* A seccomp filter (`seccomp(2)`): no sockets of its own, no programs, no processes, no debugging of others, and nothing
  that goes past these (rings of `io_uring(7)`) or past the limit of memory (`memfd_create(2)`, System V's).
* Resource limits (`setrlimit(2)`): memory, open files, sizes of files, no core dumps. And no capabilities
  (`capabilities(7)`), with which a worker of root could lift them.

Limits are there on every POSIX system, the rest on Linux: `missing` names what this kernel has not.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import stat
import struct
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from planrt.errors import IsolationError

OPEN_FILES: Final = 1024
"""Files and sockets that a process for clients' work may have open."""
LOG_BYTES: Final = 1 << 30
"""By how much the file may grow meanwhile that the worker's log goes to, where it is a file: no other one grows."""

# prctl(2)
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
_FILTER_MODE = 2

# landlock(7)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS: Final = (13, 13, 14, 15, 15, 16, 16)
"""How many rights to files each version has, from version 1 on; the last bits are refer, truncate and ioctl."""
_TCP: Final = 0b11
_OUTSIDE: Final = 0b11
"""Scopes: abstract Unix sockets, signals."""

# seccomp: classic BPF over `struct seccomp_data` (nr, arch, instruction pointer, args)
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x10000
_X32 = 0x40000000

_CALLS: Final[dict[str, tuple[int, int, int, tuple[int, ...]]]] = {
    # machine -> (AUDIT_ARCH, clone, clone3, refused): socket, connect, bind, listen, accept(4), execve(at), (v)fork,
    # ptrace, process_vm_readv/writev, pidfd_getfd, bpf, perf_event_open, unshare, setns, mount,
    # memfd_create, memfd_secret, shmget, msgget, mq_open, add_key, request_key, keyctl, userfaultfd,
    # open_by_handle_at, truncate (which Landlock before version 3 does not refuse)
    "x86_64": (
        0xC000003E, 56, 435,
        (41, 42, 49, 50, 43, 288, 59, 322, 57, 58, 101, 310, 311, 438, 321, 298, 272, 308, 165,
         319, 447, 29, 68, 240, 248, 249, 250, 323, 304, 76),
    ),
    "aarch64": (
        0xC00000B7, 220, 435,
        (198, 203, 200, 201, 202, 242, 221, 281, 117, 270, 271, 438, 280, 241, 97, 268, 40,
         279, 447, 194, 186, 180, 217, 218, 219, 282, 265, 45),
    ),
}  # fmt: skip


_RINGS: Final = (425, 426, 427)
"""io_uring_setup, io_uring_enter, io_uring_register, on every machine: what they do no filter sees."""

# capset(2)
_CAPABILITIES_VERSION = 0x20080522
_READ_ANY_FILE = 1 << 2
"""Stays, for modules that belong to others than root: which files it may read Landlock says."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Returns the version of Landlock that this kernel has; 0 for none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(_CREATE_RULESET, 0, 0, _VERSION_FLAG)))


def missing() -> list[str]:
    """Returns what this system lacks of what confines a process, in words."""
    lacks = []
    version = landlock_version()
    if version == 0:
        lacks.append("no Landlock: files of this user are open to kernels that crash in a hostile way")
    elif version < 6:
        lacks.append(f"Landlock has version {version}, not 6: signals to processes of this user are open")
    if platform.machine() not in _CALLS:
        tcp = "only TCP is closed, by Landlock" if version >= 4 else "sockets of every kind are open"
        lacks.append(f"no system call filter for {platform.machine()}: {tcp}, and it can start programs")
    return lacks


def ends_with_its_parent(parent: int) -> None:
    """Lets the kernel kill this process when the thread that made it ends. `parent` is the process that did."""
    if sys.platform == "linux":
        _prctl(_SET_PDEATHSIG, 9)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def readable_by_default() -> list[Path]:
    """Returns the folders that a process has to read although nobody's data are there: Python's, torch's and planrt's
    own modules, the system's libraries, and what says how many cores there are."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {Path(sysconfig.get_path(name)) for name in names}
    found |= {Path(sys.base_prefix) / "lib", Path(__file__).parents[3]}
    found |= {Path(one) for one in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")}
    found |= {Path(one) for one in ("/sys/devices/system/cpu", "/proc/cpuinfo", "/dev/null", "/dev/urandom")}
    return sorted(path for path in found if path.exists())


def close_rings() -> None:
    """Refuses rings of `io_uring(7)` for good, as if this kernel had none. Before there is an event loop: one that has
    made a ring gives up where it cannot use it."""
    if sys.platform != "linux":
        return
    _prctl(_SET_NO_NEW_PRIVS, 1)
    steps = [_step(_LOAD, _NR)]
    for call in _RINGS:
        steps += [_step(_EQUAL, call, 0, 1), _step(_RETURN, _ERRNO | _ENOSYS)]
    _load_filter([*steps, _step(_RETURN, _ALLOW)])


def confine(*, memory: int | None, readable: Iterable[Path]) -> None:
    """Confines this process for good; it must have one thread. `memory`: bytes that it may take from now on.

    Raises:
        IsolationError: the kernel refuses a part that it has.
    """
    _set_limits(memory)
    if sys.platform != "linux":
        return
    _drop_capabilities()
    _prctl(_SET_DUMPABLE, 0)  # others of the same user neither debug it nor read its memory
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _close_files([*readable_by_default(), *readable])
    _close_calls()


def _prctl(option: int, value: int, argument: int = 0) -> None:
    if _libc().prctl(option, value, ctypes.c_void_p(argument), 0, 0) != 0:
        code = ctypes.get_errno()
        raise IsolationError(f"a process cannot be confined: prctl({option}): {os.strerror(code)}")


def _set_limits(memory: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    logs = [os.fstat(number) for number in (1, 2)]
    files = [one.st_size for one in logs if stat.S_ISREG(one.st_mode)]
    _lower(resource.RLIMIT_FSIZE, max(files) + LOG_BYTES if files else 0)
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)


def _lower(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    least = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (least, least))


def reopen_files() -> None:
    """Gives this process places of its own in the files that were open before it was there, which it would share with
    all others of the worker; they are for reading only. Standard streams stay as they are."""
    if sys.platform != "linux":
        return
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            if number < 3 or not stat.S_ISREG(os.fstat(number).st_mode):
                continue
        except OSError:  # of the list itself
            continue
        try:
            fresh = os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # where it cannot be opened again, whoever reads from it is told
            os.close(number)
            continue
        os.lseek(fresh, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
        os.dup2(fresh, number, inheritable=False)
        os.close(fresh)


def _drop_capabilities() -> None:
    """Root is like any other user then."""
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITIES_VERSION, 0))
    has = ctypes.create_string_buffer(24)
    if _libc().capget(header, has) != 0:
        return  # a kernel without them
    effective, permitted, _, _, _, _ = struct.unpack("6I", has)
    stays = struct.pack("6I", effective & _READ_ANY_FILE, permitted & _READ_ANY_FILE, 0, 0, 0, 0)
    if _libc().capset(header, stays) != 0:
        code = ctypes.get_errno()
        raise IsolationError(f"a process cannot be confined: capset: {os.strerror(code)}")


def _close_files(readable: Iterable[Path]) -> None:
    """Landlock: `readable` may be read, and modules in it loaded; nothing else is there, and no network."""
    version = landlock_version()
    if version == 0:
        return
    files = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS)) - 1]) - 1
    attributes = struct.pack("QQQ", files, _TCP if version >= 4 else 0, _OUTSIDE if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _landlock(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in readable:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rights = _EXECUTE | _READ_FILE | (_READ_DIR if path.is_dir() else 0)
                _landlock(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, folder), 0)
            finally:
                os.close(folder)
        _landlock(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _landlock(call: int, *arguments: int | bytes) -> int:
    result = int(_libc().syscall(call, *arguments))
    if result < 0:
        raise IsolationError(f"a process cannot be confined: Landlock: {os.strerror(ctypes.get_errno())}")
    return result


def _close_calls() -> None:
    known = _CALLS.get(platform.machine())
    if known is not None:
        _load_filter(_filter(*known))


def _load_filter(steps: Iterable[bytes]) -> None:
    code = b"".join(steps)
    holder = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(holder))
    place = ctypes.create_string_buffer(program, len(program))
    _prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.addressof(place))


def _step(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_so, if_not, value)


def _filter(arch: int, clone: int, clone3: int, refused: tuple[int, ...]) -> list[bytes]:
    """The filter's instructions. New processes are refused and new threads are not: `clone3` has its flags in memory,
    where no filter looks, so it is said to be missing, and libraries take `clone`."""
    steps = [
        _step(_LOAD, _ARCH),
        _step(_EQUAL, arch, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NR),
        _step(_AT_LEAST, _X32, 0, 1),
        _step(_RETURN, _ERRNO | _EPERM),
        _step(_EQUAL, clone3, 0, 1),
        _step(_RETURN, _ERRNO | _ENOSYS),
        _step(_EQUAL, clone, 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _CLONE_THREAD, 1, 0),
        _step(_RETURN, _ERRNO | _EPERM),
        _step(_RETURN, _ALLOW),
    ]
    for call in refused:
        steps += [_step(_EQUAL, call, 0, 1), _step(_RETURN, _ERRNO | _EPERM)]
    return [*steps, _step(_RETURN, _ALLOW)]
