"""The process that a program runs in. Started as a file of its own by `run_python`; imports nothing of anychip.

The outer process takes its limits and namespaces and forks; the inner one, the first of its own process namespace,
runs the program and, if that came to its last line, writes the secret into the pipe.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RECURSIVE, _PRIVATE, _NO_SUID, _NO_DEVICES = 0x4000, 0x40000, 2, 4
_MOUNT_SETATTR, _READ_ONLY, _AT_RECURSIVE, _AT_CWD = 442, 1, 0x8000, -100
_PARENT_DEATH_SIGNAL, _DUMPABLE, _NO_NEW_PRIVILEGES, _NOBODY = 1, 4, 38, 65534


def main() -> None:
    pipe, order = int(sys.argv[1]), json.loads(sys.stdin.buffer.read())
    _limit(order)
    if order["isolation"] != "none":
        _isolate(order)
    child = os.fork()
    if not child:
        _work(order, pipe)
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    sys.exit(0 if status == 0 else 1)


def _work(order: dict[str, object], pipe: int) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if order["isolation"] != "none":  # elsewhere the user's other processes would count too
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(pipe, False)
    code = 1
    try:
        exec(compile(str(order["program"]), "program", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os.write(pipe, str(order["secret"]).encode())
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _limit(order: dict[str, object]) -> None:
    seconds = max(1, round(float(str(order["seconds"]))))
    for name, value in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", order["memory_bytes"]),
        ("RLIMIT_FSIZE", order["file_bytes"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ):
        if hasattr(resource, name):
            limit = int(str(value))
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _isolate(order: dict[str, object]) -> None:
    """Namespaces of its own: no network, no other processes, everything read-only but this folder, now in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    if order["isolation"] == "nobody":
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        libc.prctl(_DUMPABLE, 1, 0, 0, 0)  # or /proc/self would be root's
    user, group = os.getuid(), os.getgid()
    _done(libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_PIDS | _NEW_MOUNTS | _NEW_IPC))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
    folder = os.getcwd().encode()  # noqa: PTH109
    _done(libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None))
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    _done(libc.syscall(_MOUNT_SETATTR, _AT_CWD, b"/", _AT_RECURSIVE, attributes, ctypes.sizeof(attributes)))
    size = f"size={order['file_bytes']},mode=700".encode()
    _done(libc.mount(b"tmpfs", folder, b"tmpfs", _NO_SUID | _NO_DEVICES, size))
    os.chdir(folder)


def _done(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


main()
