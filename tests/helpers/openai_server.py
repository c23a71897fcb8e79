"""A local HTTP server that speaks OpenAI's chat completions and fails as real ones do."""

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "cut", "empty", "too many words", "slow")


class Server(ThreadingHTTPServer):
    """`fault(body, attempt)` names what to do to a request's nth attempt, or None; it may also be the answer itself: a JSON
    value, HTML, or (status, either). `answered` counts good answers."""

    def __init__(self, answer, fault=lambda body, attempt: None, key="sk-test"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.fault, self.key = answer, fault, key
        self.attempts, self.answered = Counter(), Counter()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if "Content-Type" not in dict(headers):
            self.send_header("Content-Type", "application/json")
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, status, message, code=None, headers=()):
        self.reply(status, {"error": {"message": message, "type": "error", "code": code}}, headers)

    def allowed(self):
        if self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self.error(401, "Incorrect API key provided", "invalid_api_key")
        return False

    def completion(self, body):
        message = {"role": "assistant", "content": self.server.answer(body), "refusal": None}
        if message["content"] == "REFUSE":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        words = sum(len(m["content"].split()) for m in body["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": 10, "total_tokens": words + 10}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.allowed():
            self.chat(json.loads(data))

    def chat(self, body):
        name = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        with self.server.lock:
            self.server.attempts[name] += 1
            fault = self.server.fault(body, self.server.attempts[name])
        if isinstance(fault, tuple | dict | list) or str(fault).startswith("<"):
            status, said = fault if isinstance(fault, tuple) else (200, fault)
            html = isinstance(said, str)
            kind = [("Content-Type", "text/html")] if html else []
            return self.reply(status, said.encode() if html else said, kind)
        if fault == "newer model" and "max_tokens" in body:
            return self.error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if fault in ("context_length_exceeded", "content_filter"):
            return self.error(400, "This question is not answered", fault)
        if fault == "400":
            return self.error(400, "Unknown parameter")
        if fault == "429":
            return self.error(429, "Rate limit reached", "rate_limit_exceeded", [("Retry-After", "0.01")])
        if fault == "quota":
            return self.error(429, "You exceeded your current quota", "insufficient_quota")
        if fault == "403":
            return self.error(403, "Country not supported")
        if fault == "500":
            return self.error(500, "The server had an error")
        if fault == "cut":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"id":')
            self.close_connection = True
            return self.connection.close()
        if fault == "not json":
            return self.reply(200, b"{'id': oops")
        if fault == "slow":
            time.sleep(0.6)
        response = self.completion(body)
        if fault == "empty":
            response["choices"][0]["message"]["content"] = ""
        if fault == "too many words":
            response["choices"][0]["finish_reason"] = "length"
        with self.server.lock:
            self.server.answered[name] += fault not in ("empty", "too many words")
        self.reply(200, response)
