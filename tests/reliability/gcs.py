"""What gcp-storage-emulator lacks of Google's storage, and a training run uses: conditions on generations."""

import http.client
import json
import threading
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.data.buckets import Loopback, _Handler


class Gcs(Loopback):
    """An emulator with generations: writes on condition, and reads that tell theirs."""

    def __init__(self, upstream):
        super().__init__(upstream)
        self.RequestHandlerClass = _WithGenerations
        self.writing = threading.Lock()

    def ask(self, method, path, body=b"", headers=None):
        """(status, headers, content) of the emulator's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def generation(self, bucket, name):
        """Of an object; "0" if there is none."""
        status, _, content = self.ask("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        return json.loads(content)["generation"] if status == 200 else "0"


class _WithGenerations(_Handler):
    def _pass_on(self):
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        parts = address.path.split("/")
        bucket = parts[parts.index("b") + 1] if "b" in parts else ""
        name = query.get("name") or unquote("/".join(parts[parts.index("o") + 1 :]) if "o" in parts else "")
        if self.command in ("POST", "PUT", "DELETE") and "ifGenerationMatch" in query:
            with self.server.writing:  # nobody else writes between the question and the answer
                if self.server.generation(bucket, name) != query["ifGenerationMatch"]:
                    return self._refuse()
                return super()._pass_on()
        self.name = (bucket, name) if self.command == "GET" and query.get("alt") == "media" else None
        return super()._pass_on()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _pass_on
    name = None

    def _answer(self, status, headers, content, fault="ok"):
        if self.name and status in (200, 206):
            headers = {**headers, "X-Goog-Generation": self.server.generation(*self.name)}
        super()._answer(status, headers, content, fault)

    def _refuse(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(412, {"Content-Type": "application/json"}, b'{"error": {"code": 412}}')
