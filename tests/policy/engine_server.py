"""A server of the engines' protocols, over real HTTP, that samples from a model with torch in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

Answer = tuple[int, Any]
Fault = Callable[[int, Answer], Answer | None]
"""From the number of the request and the good answer to what is sent; None for the good one. A text is sent
as it is, and bytes are sent as the beginning of an answer that breaks off."""


@dataclass
class Engine:
    """What the server serves and what it has been asked.

    Attributes:
        model: the weights it has.
        logprobs: which log-probs it gives: ``raw``, ``tempered`` or ``processed``.
        order: in which it truncates.
        ids: how it gives token ids: ``token_ids``, ``response_token_ids``, ``tokens`` or ``none``.
        instead: settings of its own, which it takes in place of those that it is asked for.
        fault: what goes wrong.
        names: under which it serves.
        bodies: of the requests so far.
    """

    model: Any
    logprobs: str = "processed"
    order: tuple[str, ...] = ("min_p", "top_k", "top_p")
    ids: str = "token_ids"
    fault: Fault = lambda number, answer: None
    names: tuple[str, ...] = ("policy",)
    ignores_truncation: bool = False
    instead: dict[str, Any] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sampled(
        self, prompt: list[int], seed: int, most: int, ends: list[int], how: dict[str, Any]
    ) -> tuple[list[int], list[float]]:
        """One response with its log-probs, token by token."""
        how = how | self.instead
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        said: list[float] = []
        warpers = {"top_k": TopKLogitsWarper(how["top_k"])} if how["top_k"] > 0 else {}
        if how["top_p"] < 1:
            warpers["top_p"] = TopPLogitsWarper(how["top_p"])
        if how["min_p"] > 0:
            warpers["min_p"] = MinPLogitsWarper(how["min_p"])
        while len(ids) < most and not (ids and ids[-1] in ends):
            with torch.no_grad():
                logits = self.model(torch.tensor([[*prompt, *ids]])).logits[:, -1]
            cool = logits / how["temperature"]
            left = cool
            for name in self.order:
                if name in warpers and not self.ignores_truncation:
                    left = warpers[name](torch.zeros(1, 1, dtype=torch.long), left)
            token = int(torch.multinomial(left.softmax(-1), 1, generator=generator))
            shown = {"raw": logits, "tempered": cool, "processed": left}[self.logprobs]
            ids.append(token)
            said.append(float(shown.log_softmax(-1)[0, token]))
        return ids, said

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        """To a request, before anything goes wrong."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name} for name in self.names]}
        if path == "/v1/completions":
            ids, said = self.sampled(
                body["prompt"], body["seed"], body["max_tokens"], body["stop_token_ids"], body
            )
            choice: dict[str, Any] = {
                "index": 0,
                "text": "",
                "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": said, "tokens": ["?"] * len(ids)},
            }
            if self.ids == "tokens":
                choice["logprobs"]["tokens"] = [f"token_id:{token}" for token in ids]
            elif self.ids != "none":
                choice[self.ids] = ids
            return 200, {"model": body["model"], "choices": [choice]}
        if path == "/generate":
            how = body["sampling_params"]
            ids, said = self.sampled(
                body["input_ids"], how["sampling_seed"], how["max_new_tokens"], how["stop_token_ids"], how
            )
            triples = [[value, token, None] for value, token in zip(said, ids, strict=True)]
            meta = {"output_token_logprobs": triples, "finish_reason": {"type": "stop"}}
            return 200, {"text": "", "output_ids": ids, "meta_info": meta}
        return 404, {"error": "no such path"}


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """A block in which an engine is served; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(engine.answer(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with engine.lock:
                engine.bodies.append(body)
                engine.headers.append(dict(self.headers))
                number = len(engine.bodies)
                good = engine.answer(self.path, body)
            self._reply(engine.fault(number, good) or good)

        def _reply(self, answer: Answer) -> None:
            status, content = answer
            cut = isinstance(content, bytes)
            payload = content if cut else content if isinstance(content, str) else json.dumps(content)
            data = payload if isinstance(payload, bytes) else payload.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) + (100 if cut else 0)))
            self.end_headers()
            try:
                self.wfile.write(data)
            except OSError:
                return
            if cut:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
