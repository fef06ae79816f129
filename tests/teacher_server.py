"""A small vLLM on this machine, for tests over real HTTP: `/v1/models`, and `/v1/completions` with `prompt_logprobs`.

It answers as vLLM 0.12 does: k entries per position by id, and one more for the token of the prompt where that is not
among them; limits of log-probabilities and of the context; keys. It fails on request.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class TeacherServer:
    """Serves the log-probabilities of a model.

    Attributes:
        url: where it listens.
        requests: paths of the requests, in order.
        delay: seconds before each answer.
        faults: what goes wrong next, each once: a status, "drop" (the connection is cut), "stall" (no answer), or
            None: nothing.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "pocket", **options: Any) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.options = {"max_logprobs": 20, "max_model_len": 4096, "key": None, "program": "vllm", **options}
        self.requests: list[str] = []
        self.faults: list[int | str | None] = []
        self.lock, self.released = threading.Lock(), threading.Event()
        self.most_at_once, self.at_once, self.delay = 0, 0, 0.0

    def __enter__(self) -> TeacherServer:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    @torch.no_grad()
    def prompt_logprobs(self, ids: list[int], top_k: int) -> list[dict[str, Any] | None]:
        logits = self.model(torch.tensor([ids])).logits[0].float()
        found: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(ids[1:]):
            row = torch.log_softmax(logits[place], -1)
            if self.options["program"] == "raw logits":
                row = logits[place] + 20
            values, tokens = row.topk(top_k)
            rank = int((row >= row[token]).sum())
            entry = {token: {"logprob": float(row[token]), "rank": rank, "decoded_token": "x"}}
            for number, (value, one) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True), 1):
                entry[one] = {"logprob": value, "rank": number, "decoded_token": "x"}
            found.append({str(one): value for one, value in entry.items()})
        return found


class Handler(BaseHTTPRequestHandler):
    state: TeacherServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode() if not isinstance(content, bytes) else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, said: str) -> None:
        self.answer({"error": {"message": said, "type": "BadRequestError", "code": status}}, status)

    def is_allowed(self) -> bool:
        key = self.state.options["key"]
        self.state.requests.append(self.path)
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.answer({"error": "Unauthorized"}, 401)
        return False

    def do_GET(self) -> None:
        if not self.is_allowed():
            return
        options = self.state.options
        if options["program"] == "page":
            self.answer(b"<html>caf\xe9</html>")
        elif self.path == "/v1/models" and options["program"] != "web":
            owner = "vllm" if options["program"] != "tgi" else "me/model"
            card = {"object": "model", "owned_by": owner, "max_model_len": options["max_model_len"]}
            cards = [{**card, "id": name} for name in (self.state.name, *options.get("others", ()))]
            cards += [{**card, "id": "adapter", "parent": self.state.name}]
            self.answer({"object": "list", "data": cards})
        elif self.path == "/info" and options["program"] == "tgi":
            self.answer({"model_id": "me/model", "router": "text-generation-router", "version": "3.3.4"})
        else:
            self.answer(b"<html>not here</html>", 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        state = self.state
        with state.lock:
            fault = state.faults.pop(0) if state.faults else None
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
            elif fault == "stall":
                state.released.wait()
            elif isinstance(fault, int):
                self.refuse(fault, "try again")
            else:
                time.sleep(state.delay)
                self.complete(body)
        finally:
            with state.lock:
                state.at_once -= 1

    def complete(self, body: dict[str, Any]) -> None:
        options, top_k = self.state.options, body["prompt_logprobs"]
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.state.tokenizer(ids, add_special_tokens=False)["input_ids"]
        if body["model"] not in (self.state.name, *options.get("others", ()), "adapter"):
            return self.refuse(404, f"The model `{body['model']}` does not exist.")
        if top_k > options["max_logprobs"]:
            return self.refuse(
                400,
                f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {options['max_logprobs']}",
            )
        if len(ids) + body["max_tokens"] > options["max_model_len"]:
            return self.refuse(400, f"This model's maximum context length is {options['max_model_len']} tokens.")
        entries = None if options["program"] == "openai" else self.state.prompt_logprobs(ids, top_k)
        choice = {"index": 0, "text": " x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
        return self.answer({"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]})
