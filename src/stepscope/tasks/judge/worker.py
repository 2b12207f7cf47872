"""A process of its own for code that reads untrusted text: it can be killed, and a crash of it is an answer.

Not :mod:`multiprocessing`: that would import the user's script again (spawn) or fork a process with threads.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import IO, Any

from stepscope.errors import TaskError

SERVE = "from stepscope.tasks.judge.worker_main import main; main()"
_START_LIMIT = 120.0
_GRACE = 5.0
"""Seconds for the helper to end a child that took too long and to say so."""


class Worker:
    """One helper process, started at the first question and again whenever it had to be killed.

    Questions and answers are JSON, one per line, and numbered. The process sees nothing of this one's
    environment, and its home is a private folder that is removed with it; the hash seed is fixed, so that
    what it generates does not change from run to run. It ends by itself when its standard input closes.

    Args:
        program: what it runs.
    """

    def __init__(self, program: str = SERVE) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._private = ""
        self._pending = b""
        self._number = 0
        self._isolation = ""

    def ask(self, question: dict[str, Any], *, time_limit: float) -> dict[str, Any] | None:
        """Put one question; questions from several threads are answered one after the other.

        Args:
            question: JSON-ready; ``op`` names the operation of ``worker_main.py``.
            time_limit: seconds for the answer itself, not counting the start of the process and the loading
                of what the question needs.

        Returns:
            The answer, or None if what reads it died over it or had to be killed at the time limit. A verdict
            is ``{"value": v}`` with v true, false or a number from 0 to 1.

        Raises:
            TaskError: the process cannot load what it needs for any question.
        """
        with self._lock:
            try:
                return self._exchange(question, time_limit)
            except _HelperEndedError:
                return self._second_try(question, time_limit)

    def isolation(self) -> str:
        """Why answers are not isolated by the kernel on this system; empty where they are.

        Raises:
            TaskError: the process does not start.
        """
        with self._lock:
            self._running()
            return self._isolation

    def _second_try(self, question: dict[str, Any], time_limit: float) -> dict[str, Any] | None:
        try:
            return self._exchange(question, time_limit)
        except _HelperEndedError as ended:
            if ended.prepared:
                return None
            raise TaskError(
                f"the helper process cannot prepare {question['op']} ({ended.log}); is the installation "
                "complete, and is there memory left"
            ) from None

    def _exchange(self, question: dict[str, Any], time_limit: float) -> dict[str, Any] | None:
        """One question and its answer; afterwards the process is ready for the next, or gone."""
        prepared = finished = False
        try:
            process = self._running()
            self._number += 1
            asked = {"number": self._number, "limit": time_limit, "question": question}
            self._write(process, json.dumps(asked).encode() + b"\n")
            if self._message(process, _START_LIMIT) != {"number": self._number}:
                raise _HelperEndedError
            prepared = True
            reply = self._message(process, time_limit + _GRACE)
            if reply is None:
                return None
            if set(reply) != {"number", "reply"} or reply["number"] != self._number:
                raise _HelperEndedError
            answer = reply["reply"]
            if answer is not None and not isinstance(answer, dict):
                raise _HelperEndedError
            finished = True
            return answer
        except (BrokenPipeError, _HelperEndedError) as error:
            raise _HelperEndedError(prepared=prepared, log=self._error_log()) from error
        finally:
            if not finished:  # also on an interrupt: a late answer must not meet the next question
                self._stop()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._private = tempfile.mkdtemp(prefix="stepscope-")
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-B", "-W", "ignore", "-c"]
            + [f"import sys; sys.path += [p for p in sys.argv[1:] if p not in sys.path]; {self._program}"]
            + [str(Path(path).resolve()) for path in sys.path if path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=self._private,
            env=_environment(self._private),
        )
        self._process, self._pending = process, b""
        hello = self._message(process, _START_LIMIT)
        if hello is None or not isinstance(hello.get("isolation"), str):
            log = self._error_log()
            self._stop()
            raise TaskError(f"the helper process that scores answers does not start ({log})")
        self._isolation = hello["isolation"]
        if self._isolation:
            warnings.warn(
                f"answers are not isolated on this system: {self._isolation}; scorers that evaluate answers "
                "are refused",
                stacklevel=2,
            )
        return process

    def _error_log(self) -> str:
        """The last line of what the process wrote to standard error."""
        if self._errors is None:
            return "no message"
        self._errors.seek(0)
        lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    @staticmethod
    def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(data)
        process.stdin.flush()

    def _message(self, process: subprocess.Popen[bytes], time_limit: float) -> dict[str, Any] | None:
        """The next message; None at the end of the time.

        Raises:
            _HelperEndedError: the stream ended, or what came is no message.
        """
        line = self._read_line(process, time_limit)
        if line is None:
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise _HelperEndedError from None
        if not isinstance(message, dict):
            raise _HelperEndedError
        return message

    def _read_line(self, process: subprocess.Popen[bytes], time_limit: float) -> bytes | None:
        """The next line; None at the end of the time."""
        assert process.stdout is not None
        deadline = time.monotonic() + time_limit
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise _HelperEndedError
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
        if self._private:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = ""


class _HelperEndedError(Exception):
    """The helper ended or said what it never says."""

    def __init__(self, *, prepared: bool = False, log: str = "") -> None:
        super().__init__(log)
        self.prepared, self.log = prepared, log


def _environment(private: str) -> dict[str, str]:
    """Nothing of ours but what Python may need to start."""
    kept = {k: os.environ[k] for k in ("LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT") if k in os.environ}
    own = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), private)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", **kept, **own, **threads}


@functools.cache
def _worker_of(pid: int) -> Worker:
    worker = Worker()

    def close() -> None:
        if os.getpid() == pid:  # a forked child runs this too, and the helper is not its own
            worker.close()

    atexit.register(close)
    return worker


def shared_worker() -> Worker:
    """The helper of this process; a forked child gets its own."""
    return _worker_of(os.getpid())
