"""What the kernel lets a process of the helper do: Landlock for its files, seccomp for its system calls.

Neither needs root, neither can be undone, and both hold whatever Python or native code the process comes to
run. Landlock (landlockpy) confines the helper to a read-only view of the Python installation and one private
folder; a seccomp filter (seccompy) leaves a child that reads an answer nothing but computing, reading files
in that view, and writing to the pipe of its reply.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

LIMITS = {
    resource.RLIMIT_AS: 6 << 30,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 1 << 20,
    resource.RLIMIT_NOFILE: 256,
}
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/nix/store")
SYSTEM_FILES = ("/dev/urandom", "/etc/ld.so.cache", "/etc/localtime")

PACKAGES = ("antlr4", "latex2sympy2_extended", "math_verify", "mpmath", "numpy", "reasoning_gym", "sympy")

COMPUTING = """
brk mmap munmap mremap mprotect madvise
read readv pread64 write writev lseek close dup dup2 dup3
fstat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd getdents64
poll ppoll select pselect6
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack alarm setitimer getitimer restart_syscall
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
futex set_robust_list rseq membarrier
getrandom getpid gettid getppid getuid geteuid getgid getegid uname sysinfo
getrusage getrlimit sched_yield sched_getaffinity getcpu exit exit_group
"""
"""System calls allowed with any arguments: none starts a process, names a file to change, or connects."""

END_WITH_PARENT = 1
TERMINAL_QUERY = 0x5401
DUPLICATE_CLOSING = 1030
ALLOWED_WITH: Mapping[str, tuple[int, Iterable[int]]] = {
    "ioctl": (1, [TERMINAL_QUERY]),
    "fcntl": (1, [0, 1, 2, 3, DUPLICATE_CLOSING]),
    "prlimit64": (2, [0]),
}
"""Others, by the argument that decides and its values: is it a terminal, descriptor flags, reading limits."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OPENING = {"open": 1, "openat": 2}
"""Which argument holds the flags."""


def limit_resources() -> None:
    """Bound memory, files and core dumps; a lower limit that is in force already stays."""
    for kind, wanted in LIMITS.items():
        hard = resource.getrlimit(kind)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that forked it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def isolate(private: Path) -> tuple[SystemCalls | None, str]:
    """Confine this process to its files and make the filter for its children.

    Returns:
        The filter, or None and the reason why this system cannot isolate.
    """
    if sys.platform != "linux":
        return None, f"Landlock and seccomp exist on Linux only, this is {platform.system()}"
    import landlockpy
    import seccompy

    try:
        if not landlockpy.supported():
            return None, "its kernel offers no Landlock (Linux 5.13 or newer, enabled at boot)"
        if not seccompy.supported():
            return None, "its kernel offers no seccomp filters"
        system_calls = SystemCalls()
        confine_files(private)
    except (landlockpy.LandlockError, seccompy.SeccompError, seccompy.UnsupportedError) as error:
        return None, f"Landlock or seccomp is refused here ({error})"
    return system_calls, "" if system_calls.hold() else "a system-call filter cannot be loaded here"


def readable_folders() -> Iterator[str]:
    """Where Python, the installed packages and stepscope itself lie."""
    yield from (sys.prefix, sys.base_prefix, sys.exec_prefix, *SYSTEM, str(Path(__file__).parents[3]))
    yield from (path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    for package in PACKAGES:  # wherever else they were put: PYTHONPATH, an editable installation
        spec = importlib.util.find_spec(package)
        yield from (spec.submodule_search_locations or ()) if spec else ()
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))


def confine_files(private: Path) -> None:
    """Leave this process, and all it forks, the installation to read, ``private`` to write, no TCP ports."""
    from landlockpy import AccessFS, Ruleset, Scope

    read = AccessFS.READ_FILE | AccessFS.READ_DIR
    change = AccessFS.WRITE_FILE | AccessFS.TRUNCATE | AccessFS.MAKE_REG | AccessFS.MAKE_DIR
    with Ruleset(scoped=Scope.SIGNAL | Scope.ABSTRACT_UNIX_SOCKET) as rules:
        for folder in dict.fromkeys(readable_folders()):
            if Path(folder).is_dir():
                rules.allow_path(folder, read)
        for file in SYSTEM_FILES:
            if Path(file).exists():
                rules.allow_path(file, AccessFS.READ_FILE)
        rules.allow_path("/dev/null", AccessFS.READ_FILE | AccessFS.WRITE_FILE)
        rules.allow_path(private, read | change | AccessFS.REMOVE_FILE | AccessFS.REMOVE_DIR)
        rules.restrict()


class SystemCalls:
    """The filter of a child: built and compiled once, loaded in each after the fork."""

    def __init__(self) -> None:
        from seccompy import Action, ArgCmp, CmpOp, Filter, syscall_nr

        def known(name: str) -> bool:  # each architecture lacks some of the older calls
            try:
                return syscall_nr(name) >= 0
            except ValueError:
                return False

        self._filter = Filter(default=Action.ERRNO | errno.EPERM)
        for name in filter(known, COMPUTING.split()):
            self._filter.allow(name)
        for name, (argument, values) in ALLOWED_WITH.items():
            for value in values if known(name) else ():
                self._filter.allow(name, args={argument: value})
        for name, argument in OPENING.items():
            if known(name):
                self._filter.allow(name, args=[ArgCmp(argument, CmpOp.MASKED_EQ, 0, WRITING)])
        assert self._filter.program

    def hold(self) -> bool:
        """Whether a child of this process can load it."""
        pid = os.fork()
        if pid == 0:
            try:
                self.restrict()
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(pid, 0)[1] == 0

    def restrict(self) -> None:
        """Refuse every other system call from now on, with EPERM."""
        self._filter.load()
