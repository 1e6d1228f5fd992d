import hashlib
import multiprocessing
import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.weights import download
from clip_jax.weights.download import Patience

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(stall_seconds=0.5, attempts=3, pause_seconds=0.01)


@pytest.fixture
def server(monkeypatch):
    """Start a server whose `behaviour(handler, attempt)` answers the requests for ViT-B/32; its list of requests."""
    started = []

    def start(behaviour):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append((self.path, self.headers.get("Range")))
                behaviour(self, len(requests))

            def log_message(self, *arguments):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        monkeypatch.setenv(download.MIRROR_VARIABLE, f"http://127.0.0.1:{http.server_port}/models/")
        monkeypatch.setitem(download.OFFICIAL_FILES, "ViT-B/32", (SHA256, "ViT-B-32.pt"))
        return requests

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


def send(handler, body=CONTENT, *, ranges=True, length=True, stop_after=None):
    """A well-behaved answer, unless told otherwise."""
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and ranges else 0
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    if length:
        handler.send_header("Content-Length", str(len(body) - start))
    handler.end_headers()
    handler.wfile.write(body[start:][:stop_after])


def fetched(folder):
    path = download.fetch("ViT-B/32", folder, QUICK)
    assert path.read_bytes() == CONTENT
    assert not path.with_name("ViT-B-32.pt.part").exists()
    return path


def refused(folder, match):
    with pytest.raises(UserError, match=match):
        download.fetch("ViT-B/32", folder, QUICK)
    assert not (folder / "ViT-B-32.pt").exists()


def test_download_then_cache(server, tmp_path):
    requests = server(lambda handler, _: send(handler))
    path = fetched(tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / "ViT-B-32.pt"
    assert requests == [(f"/models/{SHA256}/ViT-B-32.pt", None)]
    fetched(tmp_path / "new" / "cache")
    assert len(requests) == 1


def test_corrupt_cache_is_replaced(server, tmp_path):
    requests = server(lambda handler, _: send(handler))
    (tmp_path / "ViT-B-32.pt").write_bytes(CONTENT[:-1] + b"?")
    fetched(tmp_path)
    assert len(requests) == 1


def test_truncated_download_continues(server, tmp_path):
    requests = server(lambda handler, attempt: send(handler, stop_after=100_000))
    fetched(tmp_path)
    assert [asked for _, asked in requests] == [None, "bytes=100000-", "bytes=200000-"]


def test_stalled_download_continues(server, tmp_path):
    def stall(handler, attempt):
        send(handler, stop_after=200_000)
        if attempt == 1:
            time.sleep(3)

    requests = server(stall)
    started = time.monotonic()
    fetched(tmp_path)
    assert requests[1][1] == "bytes=200000-" and time.monotonic() - started < 2.5


def test_part_of_an_earlier_process_continues(server, tmp_path):
    requests = server(lambda handler, _: send(handler))
    (tmp_path / "ViT-B-32.pt.part").write_bytes(CONTENT[:1234])
    fetched(tmp_path)
    assert requests[0][1] == "bytes=1234-"


@pytest.mark.parametrize("part", [b"wrong", CONTENT + b"more"], ids=["wrong", "too long"])
def test_bad_part_is_started_over(server, tmp_path, part):
    def answer(handler, _):
        if handler.headers.get("Range") == f"bytes={len(CONTENT) + 4}-":
            handler.send_error(416)
        else:
            send(handler)

    server(answer)
    (tmp_path / "ViT-B-32.pt.part").write_bytes(part)
    fetched(tmp_path)


def test_server_that_ignores_ranges(server, tmp_path):
    server(lambda handler, attempt: send(handler, ranges=False, stop_after=100_000 if attempt == 1 else None))
    fetched(tmp_path)


def test_server_without_lengths(server, tmp_path):
    server(lambda handler, _: send(handler, length=False))
    fetched(tmp_path)


def test_server_without_lengths_that_truncates(server, tmp_path):
    requests = server(lambda handler, _: send(handler, length=False, stop_after=9))
    refused(tmp_path, "SHA-256")
    assert len(requests) == 2


def test_corrupt_file_is_never_kept(server, tmp_path):
    server(lambda handler, _: send(handler, CONTENT[:-1] + b"?"))
    refused(tmp_path, "SHA-256")
    assert not (tmp_path / "ViT-B-32.pt.part").exists()


def test_redirect_is_followed(server, tmp_path):
    def redirect(handler, attempt):
        if handler.path.startswith("/models"):
            handler.send_response(302)
            handler.send_header("Location", "/elsewhere")
            handler.end_headers()
        else:
            send(handler)

    requests = server(redirect)
    fetched(tmp_path)
    assert [path for path, _ in requests][-1] == "/elsewhere"


def test_redirect_to_a_local_file_is_not_followed(server, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)

    def redirect(handler, _):
        handler.send_response(302)
        handler.send_header("Location", f"file://{secret}")
        handler.end_headers()

    server(redirect)
    refused(tmp_path, "302")


def test_redirect_to_no_address_is_refused(server, tmp_path):
    def redirect(handler, _):
        handler.send_response(302)
        handler.send_header("Location", "http://[::1")
        handler.end_headers()

    server(redirect)
    refused(tmp_path, "redirects to something that is no address")


def test_missing_file_fails_at_once(server, tmp_path):
    requests = server(lambda handler, _: handler.send_error(404))
    refused(tmp_path, "404")
    assert len(requests) == 1


def test_busy_server_is_retried(server, tmp_path):
    requests = server(lambda handler, attempt: handler.send_error(503) if attempt < 3 else send(handler))
    fetched(tmp_path)
    assert len(requests) == 3


def test_endless_file_is_cut(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    server(lambda handler, _: send(handler, length=False))
    refused(tmp_path, "more than 1000 bytes")


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setenv(download.MIRROR_VARIABLE, "http://127.0.0.1:9")
    refused(tmp_path, "3 times in a row$")  # nothing came, so nothing is kept


@pytest.mark.parametrize("mirror", ["mirror.example", "https://", "http://[::1", "http://host:port"])
def test_mirror_that_is_no_address(tmp_path, monkeypatch, mirror):
    monkeypatch.setenv(download.MIRROR_VARIABLE, mirror)
    refused(tmp_path, "must be an address")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=download.CACHE_VARIABLE):
        download.fetch("ViT-B/32", tmp_path / "file")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(download.CACHE_VARIABLE, raising=False)
    assert download.cache_folder() == (tmp_path.home() / ".cache" / "clip_jax")
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path))
    assert download.cache_folder() == tmp_path
    assert download.cache_folder("x").name == "x"


@contextmanager
def _processes(count, target, *arguments):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    yield processes
    for process in processes:
        process.join(60)


def _fetch_in_child(folder):
    download.OFFICIAL_FILES["ViT-B/32"] = (SHA256, "ViT-B-32.pt")
    download.fetch("ViT-B/32", folder, QUICK)


def test_two_processes_download_once(server, tmp_path):
    def slowly(handler, _):
        time.sleep(0.2)
        send(handler)

    requests = server(slowly)
    with _processes(2, _fetch_in_child, tmp_path) as processes:
        pass
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(requests) == 1
    assert (tmp_path / "ViT-B-32.pt").read_bytes() == CONTENT


def test_killed_download_leaves_no_file_and_no_lock(server, tmp_path):
    entered = threading.Event()

    def hang(handler, attempt):
        send(handler, stop_after=1000)
        if attempt == 1:
            handler.wfile.flush()
            entered.set()
            time.sleep(0.4)

    requests = server(hang)
    with _processes(1, _fetch_in_child, tmp_path) as (process,):
        assert entered.wait(60)
        os.kill(process.pid, 9)
    assert not (tmp_path / "ViT-B-32.pt").exists()
    requests.clear()
    server(lambda handler, _: send(handler))
    fetched(tmp_path)
