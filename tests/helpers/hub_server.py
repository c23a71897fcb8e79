"""Local servers that speak as much of the Hugging Face hub's protocol as a download and an upload need."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
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
    with serving(Handler) as address:
        yield address, requests


@contextlib.contextmanager
def serving(handler):
    """The address of a server that runs in a thread."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def hub_to_write_to(token, cuts=()):
    """A hub with one repository, which takes uploads from the bearer of `token`: yields its address and the repository
    {"files": {name: content}, "stored": {sha256: content}, "private", "cuts"}. Weights are large files, which are stored
    before the commit. `cuts`: for each part of a path, "/store/" or "/commit/", one request ends in a cut connection."""
    repository = {"files": {}, "stored": {}, "private": None, "cuts": list(cuts)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bearer = self.headers.get("Authorization", "")
            if bearer != f"Bearer {token}":
                return self.answer(403 if bearer == "Bearer hf_reader" else 401, {"error": "no"})
            if self.path.endswith("/repos/create"):
                wanted, known = json.loads(body), repository["private"] is not None
                repository["private"] = repository["private"] if known else wanted.get("visibility") == "private"
                return self.answer(409 if known else 200, {"url": f"{self.base}/{wanted['organization']}/{wanted['name']}"})
            if "/preupload/" in self.path:
                modes = [(f["path"], f["path"].endswith((".safetensors", ".gguf"))) for f in json.loads(body)["files"]]
                modes = [dict(path=p, uploadMode="lfs" if lfs else "regular", shouldIgnore=False) for p, lfs in modes]
                return self.answer(200, {"files": modes})
            if self.path.endswith("/objects/batch"):
                objects = json.loads(body)["objects"]
                for one in objects:
                    if one["oid"] not in repository["stored"]:
                        one["actions"] = {"upload": {"href": f"{self.base}/store/{one['oid']}"}}
                return self.answer(200, {"transfer": "basic", "objects": objects})
            if "/commit/" in self.path and not self.cut():
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        repository["files"][value["path"]] = base64.b64decode(value["content"])
                    if line["key"] == "lfsFile":
                        repository["files"][value["path"]] = repository["stored"][value["oid"]]
                return self.answer(200, {"commitUrl": f"{self.base}/me/model/commit/{SHA}", "commitOid": SHA})
            if "validate-yaml" in self.path:
                self.answer(200, {"errors": [], "warnings": []})

        def cut(self):
            for part in [part for part in repository["cuts"] if part in self.path]:
                repository["cuts"].remove(part)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return True

        def do_PUT(self):
            if self.cut():
                return
            repository["stored"][self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, {})

        @property
        def base(self):
            return f"http://127.0.0.1:{self.server.server_port}"

        def answer(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with serving(Handler) as address:
        yield address, repository


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
