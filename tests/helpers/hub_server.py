"""A local server that speaks as much of the Hugging Face hub's protocol as a download needs."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
REQUEST = re.compile(r"(?:/api/models|/api/datasets|/datasets)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/?]+)/?([^?]*)")


@contextlib.contextmanager
def hub(repositories):
    """A local server that speaks as much of the hub's protocol as a download needs: which commit a revision is, which
    files it has, and the files. `repositories`: {"owner/name": directory, or (status, error code) as every answer}."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            match = REQUEST.match(self.path)
            name, what, revision, file = match.groups() if match else (None,) * 4
            found = repositories.get(name, (404, "RepoNotFound"))
            if isinstance(found, tuple):
                self.answer(found[0], b"", {"X-Error-Code": found[1]})
            elif revision not in ("main", SHA):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif what == "revision":
                self.answer(200, json.dumps({"id": name, "sha": SHA, "siblings": []}).encode())
            elif what == "tree":
                paths = [path for path in found.rglob("*") if path.is_file()]
                files = [
                    {"type": "file", "path": str(p.relative_to(found)), "size": p.stat().st_size, "oid": SHA} for p in paths
                ]
                self.answer(200, json.dumps(files).encode())
            else:
                body = (found / file).read_bytes()
                self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA})

        do_HEAD = do_GET

        def answer(self, status, body, headers=None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(endpoint, home, offline):
    """The environment of a process that talks to this server only; huggingface_hub reads it when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return environment | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


def lines_printed(code, arguments, endpoint, home, offline):
    """What a new Python, started in the project, prints for this code."""
    command = [sys.executable, "-c", code, *arguments]
    environment = hub_environment(endpoint, home, offline)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
