"""A server on this machine that answers as the Hugging Face hub does."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each {file name: content}; `requests` tells what was asked for."""

    def __init__(self):
        self.repositories, self.requests = {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def upload(self, name, folder):
        files = (file for file in folder.rglob("*") if file.is_file() and not file.parent.name.startswith("."))
        self.repositories[name] = {str(file.relative_to(folder)): file.read_bytes() for file in files}

    @property
    def fetched(self):
        return {path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path}

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = self.path.partition("?")[0].lstrip("/")
                hub.requests.append((self.command, path))
                is_api = path.startswith("api/")
                path = path.removeprefix("api/").removeprefix("models/").removeprefix("datasets/")
                name = "/".join(path.split("/")[:2])
                files = hub.repositories.get(name)
                if files is None:  # the hub does not tell a private repository from none
                    self.answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                elif isinstance(files, str):
                    self.answer(403, b"", {"X-Error-Code": files})
                elif is_api and "/tree/" in path:
                    rows = [self.row(file, content) for file, content in files.items()]
                    self.answer(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
                elif is_api:
                    info = {
                        "id": name,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": file, "size": len(content)} for file, content in files.items()],
                    }
                    self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
                elif (file := path.partition("/resolve/")[2].partition("/")[2]) in files:
                    etag = self.row(file, files[file])["oid"]
                    self.answer(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                else:
                    self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

            def row(self, file, content):
                oid = hashlib.sha1(content).hexdigest()
                return {"type": "file", "path": file, "size": len(content), "oid": oid}

            def answer(self, status, content, headers):
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

        return Handler


def use(monkeypatch, address=None, offline=False):
    """What HF_ENDPOINT and HF_HUB_OFFLINE do, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
