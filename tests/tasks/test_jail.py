"""Code run where answers are evaluated tries to get out; the same code gets out of a plain process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepscope.errors import TaskError
from stepscope.tasks.judge.worker import Worker

PROGRAM = """
import json, traceback
from pathlib import Path
from stepscope.tasks.judge.forking import Operations, Server

REWARD = [0.0]

def answer(op, arguments):
    if op == "reward":
        return {"value": REWARD[0]}
    if op == "say":
        import os
        os.write(1, arguments["text"].encode())
        return {"value": 0.0}
    space = {"REWARD": REWARD}
    try:
        exec(arguments["code"], space)
    except OSError as error:
        return {"value": error.errno / 1000}
    return {"value": 1.0}

Server(
    Operations(
        prepare=lambda op, arguments: None,
        answer=answer,
        reads_answer=lambda op: True,
        evaluates=lambda arguments: arguments.get("alone", True),
        trial=lambda op: None,
        loaded=lambda: 0,
    ),
    Path.cwd(),
).serve()
"""

REFUSED = {0.001, 0.013}
"""EPERM from the filter of system calls, EACCES from Landlock."""

ESCAPES = {
    "write_a_file": "open({target!r}, 'w').write('x')",
    "truncate_a_file": "import os; os.truncate({secret!r}, 0)",
    "remove_a_file": "import os; os.remove({secret!r})",
    "make_a_folder": "import os; os.mkdir({target!r})",
    "link_a_file": "import os; os.symlink({secret!r}, {target!r})",
    "read_a_secret": "open({secret!r}).read()",
    "read_passwd": "open('/etc/passwd').read()",
    "list_a_folder": "import os; os.listdir({folder!r})",
    "read_the_environment_of_the_parent": "open('/proc/{parent}/environ', 'rb').read()",
    "read_the_memory_map_of_the_parent": "open('/proc/{parent}/maps', 'rb').read()",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "send_a_datagram": "import socket; socket.socket(2, 2).sendto(b'secret', ('127.0.0.1', {port}))",
    "listen": "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()",
    "use_a_unix_socket": "import socket; socket.socketpair()",
    "fork": "import os; pid = os.fork(); pid or os._exit(0)",
    "fork_exec": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "exec": "import os; os.fork() or os.execv('/bin/true', ['true']); os.wait()",
    "kill_the_parent": "import os; os.kill({victim}, 9)",
    "ptrace": (
        "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
        "if c.ptrace(0, 0, None, None): raise OSError(ctypes.get_errno(), 'ptrace')"
    ),
    "make_a_device": "import os, stat; os.mknod({target!r}, 0o600 | stat.S_IFIFO)",
    "write_through_pyarrow": "import pyarrow; pyarrow.OSFile({target!r}, 'wb').close()",
    "set_a_limit": (
        "import resource as r\n"
        "try: r.setrlimit(r.RLIMIT_CORE, r.getrlimit(r.RLIMIT_CORE))\n"
        "except ValueError as error: raise error.__context__ or OSError(1, str(error))"
    ),
}


@pytest.fixture(scope="module")
def hostile() -> Iterator[Worker]:
    worker = Worker(f"exec({PROGRAM!r})")
    if reason := worker.isolation():
        pytest.skip(reason)
    yield worker
    worker.close()


@pytest.fixture
def victim() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_fail_in_the_helper_and_work_elsewhere(
    name: str, hostile: Worker, victim: int, tmp_path: Path
) -> None:
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {
            "secret": str(secret),
            "target": str(target),
            "folder": str(tmp_path),
            "parent": os.getpid(),
            "victim": victim,
            "port": server.getsockname()[1],
        }
        code = ESCAPES[name].format(**places)
        reply = hostile.ask({"op": "run", "code": code}, time_limit=20)
        assert reply is not None
        assert reply["value"] in REFUSED
        assert secret.read_text() == "secret"
        assert not target.exists()
        assert Path(f"/proc/{victim}").exists()
        plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert plain.returncode == 0, plain.stderr


def test_nothing_is_written_through_sqlite(hostile: Worker, tmp_path: Path) -> None:
    """Its error is its own: it can only not open the file."""
    target = tmp_path / "target"
    code = f"import sqlite3; sqlite3.connect({str(target)!r}).execute('create table t (x)')"
    assert hostile.ask({"op": "run", "code": code}, time_limit=20) is None
    assert not target.exists()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert target.exists()


def test_the_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    worker = Worker(f"exec({PROGRAM!r})")
    code = "import os\nif 'WANDB_API_KEY' in os.environ or 'HOME' not in os.environ: raise OSError(5, '')"
    assert worker.ask({"op": "run", "code": code}, time_limit=20) == {"value": 1.0}
    worker.close()


def test_one_answer_cannot_reward_the_next(hostile: Worker) -> None:
    tamper = """
import gc, sys
REWARD[0] = 1.0
for module in list(sys.modules.values()):
    if hasattr(module, "verdict"):
        module.verdict = lambda *_: {"value": 1.0}
for thing in gc.get_objects():
    if type(thing).__name__ == "Operations":
        object.__setattr__(thing, "answer", lambda *_: {"value": 1.0})
"""
    assert hostile.ask({"op": "run", "code": tamper}, time_limit=20) == {"value": 1.0}
    assert hostile.ask({"op": "reward"}, time_limit=20) == {"value": 0.0}
    kept = {"alone": False}  # where a child is kept for many answers, its state would show
    assert hostile.ask({"op": "run", "code": "REWARD[0] = 1.0", **kept}, time_limit=20) == {"value": 1.0}
    assert hostile.ask({"op": "reward", **kept}, time_limit=20) == {"value": 1.0}
    assert hostile.ask({"op": "reward"}, time_limit=20) == {"value": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "garbage\n",
        "[1]\n",
        '{"number": 1, "value": 1.0}\n',
        '{"value": 1.0}\n',
        '{"number": NUMBER, "value": NaN}\n',
        '{"number": NUMBER, "value": 1e308}\n',
        '{"number": NUMBER, "value": -1}\n',
        '{"number": NUMBER, "value": "1"}\n',
        '{"number": NUMBER, "value": null}\n',
        '{"number": NUMBER, "value": 1, "more": 1}\n',
        '{"number": NUMBER, "value": 1}\n{"number": NUMBER, "value": 1}\n',
        "[" * 4000 + "\n",
        "9" * 5000 + "\n",
        "x" * 100_000,
        "\udcff\n",
    ],
)
def test_replies_are_taken_only_if_they_are_one_verdict(text: str, hostile: Worker) -> None:
    number = str(hostile._number + 1)
    said = text.replace("NUMBER", number)
    assert hostile.ask({"op": "say", "text": said}, time_limit=20) is None
    assert hostile.ask({"op": "reward"}, time_limit=20) == {"value": 0.0}


def test_a_child_that_dies_costs_a_fork(hostile: Worker) -> None:
    """Starting the whole helper takes seconds; the bound is that of a loaded machine."""
    start = time.perf_counter()
    for _ in range(20):
        assert hostile.ask({"op": "run", "code": "import os; os._exit(1)"}, time_limit=20) is None
    assert time.perf_counter() - start < 8
    assert hostile.ask({"op": "reward"}, time_limit=20) == {"value": 0.0}


def test_a_kept_child_in_a_bad_state_is_replaced(hostile: Worker) -> None:
    """The question is asked once more, of a new child, because an earlier answer may be the cause."""
    kept = {"alone": False}
    lasting = "import builtins, sys; sys.modules['json'].dumps = None"
    assert hostile.ask({"op": "run", "code": lasting, **kept}, time_limit=20) is None
    assert hostile.ask({"op": "run", "code": "REWARD[0] = 2.0", **kept}, time_limit=20) == {"value": 1.0}
    assert hostile.ask({"op": "reward", **kept}, time_limit=20) == {"value": 0.0}


def test_a_killed_helper_takes_its_child_along_and_is_started_again() -> None:
    """Asked once more, the question meets a new helper; killed over it again, there is no verdict."""
    worker = Worker(f"exec({PROGRAM!r})")
    replies: list[object] = []
    question = {"op": "run", "code": "while True: pass"}
    asking = threading.Thread(target=lambda: replies.append(worker.ask(question, time_limit=120)))
    worker.isolation()
    asking.start()
    helpers = set()
    for _ in range(2):
        helper, child = wait_for(lambda: child_at_work(worker, helpers))
        os.kill(helper, signal.SIGKILL)
        wait_for(lambda child=child: not is_running(child))
        helpers.add(helper)
    asking.join()
    assert replies == [None]
    assert worker.ask({"op": "reward"}, time_limit=20) == {"value": 0.0}
    private = Path(worker._private)
    assert private.is_dir()
    worker.close()
    assert not private.exists()


def child_at_work(worker: Worker, ended: set[int]) -> tuple[int, int] | None:
    """The process ids of the helper, if it is a new one, and of the child it is waiting for."""
    process = worker._process
    if process is None or process.pid in ended:
        return None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    seen = children.read_text() if children.exists() else ""
    time.sleep(0.5)  # one that is there for a moment tries the filter at the start
    lasting = bool(seen) and children.exists() and children.read_text() == seen
    return (process.pid, int(seen.split()[0])) if lasting else None


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and ") Z " not in status.read_text()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_children_that_cannot_score_are_noticed() -> None:
    """Otherwise every answer would count as wrong."""
    serve = "from stepscope.tasks.judge import worker_main as w; w.answer_to = lambda *_: 1 / 0; w.main()"
    worker = Worker(serve)
    with pytest.raises(TaskError, match=r"cannot prepare equal .*a child gives no right verdict"):
        worker.ask({"op": "equal", "reference": "18", "answer": "9*2"}, time_limit=60)
    worker.close()


def test_lower_limits_stay() -> None:
    """Under ``ulimit -v`` the hard limit is below what the helper asks for."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from stepscope.errors import TaskError
from stepscope.tasks.judge.worker import Worker
worker = Worker()
assert worker.ask({"op": "equal", "reference": "18", "answer": "9*2"}, time_limit=60) == {"value": True}
worker.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
