"""A process of its own for code that reads untrusted text: it can be killed, and a crash of it is an answer.

Not :mod:`multiprocessing`: that would import the user's script again (spawn) or fork a process with threads.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

_PROGRAM = Path(__file__).with_name("worker_main.py")
_START_LIMIT = 120.0


class Worker:
    """One helper process, started at the first question and again whenever it had to be killed.

    Questions and answers are JSON, one per line. The process gets a fixed hash seed, so that what it
    generates does not change from run to run. It ends by itself when its standard input closes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._pending = b""

    def ask(self, question: dict[str, Any], *, time_limit: float) -> dict[str, Any] | None:
        """Put one question; questions from several threads are answered one after the other.

        Args:
            question: JSON-ready; ``op`` names the operation of ``worker_main.py``.
            time_limit: seconds for the answer itself, not counting the start of the process and the loading
                of what the question needs.

        Returns:
            The answer, or None if the process died over it or had to be killed at the time limit.

        Raises:
            RuntimeError: the process cannot load what it needs for any question.
        """
        with self._lock:
            process = self._running()
            line = None
            try:
                self._write(process, json.dumps(question).encode() + b"\n")
                if self._read_line(process, _START_LIMIT) is None:
                    raise RuntimeError(
                        f"{_PROGRAM.name} cannot prepare {question['op']}:\n{self._error_log()}"
                    )
                line = self._read_line(process, time_limit)
            except BrokenPipeError:
                line = None
            finally:
                if line is None:  # also on an interrupt: a late answer must not meet the next question
                    self._stop()
            return None if line is None else dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-W", "ignore", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        self._process, self._pending = process, b""
        return process

    def _error_log(self) -> str:
        """The end of what the process wrote to standard error."""
        assert self._errors is not None
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]

    @staticmethod
    def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(data)
        process.stdin.flush()

    def _read_line(self, process: subprocess.Popen[bytes], time_limit: float) -> bytes | None:
        """The next line; None at the end of the stream or of the time."""
        assert process.stdout is not None
        deadline = time.monotonic() + time_limit
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        continue  # what was left to write has no reader any more
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None


@functools.cache
def _worker_of(pid: int) -> Worker:
    return Worker()


def shared_worker() -> Worker:
    """The helper of this process; a forked child gets its own."""
    return _worker_of(os.getpid())
