"""OpenAI's nine files, from their address or a mirror into a cache.

A file has its final name only when it is whole and its SHA-256, which is part of the address, has been checked. A
broken download continues where it stopped; processes that want the same file wait for the one that fetches it.
"""

import fcntl
import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from clip_jax.errors import UserError
from clip_jax.platform import CACHE_VARIABLE, cache_folder

ADDRESS = "https://openaipublic.azureedge.net/clip/models"
MIRROR_VARIABLE = "CLIP_JAX_MIRROR"

# name -> (sha256, file name): the last two parts of the address (`_MODELS` in OpenAI's clip/clip.py).
OFFICIAL_FILES = {
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
MAX_BYTES = 4 * 2**30  # RN50x64's file is 1.3 GB
_CHUNK = 2**20


@dataclass(frozen=True)
class Patience:
    """How long to put up with a bad connection.

    Attributes:
      stall_seconds: silence after which a connection is given up.
      attempts: how often in a row a connection may bring nothing.
      pause_seconds: before the first retry; each further one waits that much longer.
    """

    stall_seconds: float = 30.0
    attempts: int = 5
    pause_seconds: float = 1.0


def available_models() -> list[str]:
    """The nine official names, as OpenAI spells them."""
    return list(OFFICIAL_FILES)


def is_official(name: str) -> bool:
    """Whether `name` is one of them."""
    return name in OFFICIAL_FILES


def fetch(name: str, download_root: str | Path | None = None, patience: Patience | None = None) -> Path:
    """The official file `name` in the cache, downloaded if it is not there whole.

    Raises:
      UserError: the address cannot be reached, or keeps sending something else than the file.
    """
    sha256, file_name = OFFICIAL_FILES[name]
    mirror = os.environ.get(MIRROR_VARIABLE) or ADDRESS
    if not _is_address(mirror):
        raise UserError(f"{MIRROR_VARIABLE} must be an address like https://HOST/PATH, got {mirror!r}")
    url = f"{mirror.rstrip('/')}/{sha256}/{file_name}"
    path = cache_folder(download_root) / file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(path.with_name(file_name + ".lock")):
            if not (path.is_file() and _sha256(path) == sha256):
                part = path.with_name(file_name + ".part")
                _download(url, part, sha256, patience or Patience())
                os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another cache with {CACHE_VARIABLE}") from error
    return path


def _is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an open bracket, a port that is no number
        return False


@contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the system releases even if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, part: Path, sha256: str, patience: Patience) -> None:
    """Fill `part` with the file; a continued download that turns out wrong is started over once."""
    for _ in range(2):
        _fill(url, part, patience)
        if _sha256(part) == sha256:
            return
        part.unlink()
    raise UserError(f"{url} sent a file whose SHA-256 is not {sha256}, twice; try another network or {MIRROR_VARIABLE}")


def _fill(url: str, part: Path, patience: Patience) -> None:
    """Connect until the file is as long as the server says."""
    failures = 0
    while True:
        before = _size(part)
        try:
            if _continue(url, part, patience.stall_seconds):
                return
            reason = f"the connection ended after {_size(part)} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # nothing lies beyond what is here: the SHA-256 decides
                return
            if error.code < 500 and error.code not in (408, 416, 429):
                raise UserError(f"{url} answered {error.code} {error.reason}") from error
            reason = f"the server answered {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
        except ValueError as error:  # what urllib makes of a redirect to something that is no address
            raise UserError(f"{url} redirects to something that is no address: {error}") from error
        failures = 0 if _size(part) > before else failures + 1
        if failures == patience.attempts:
            kept = f"; what came is kept in {part}" if _size(part) else ""
            raise UserError(f"cannot download {url}: {reason}, {failures} times in a row{kept}")
        time.sleep(patience.pause_seconds * failures)


def _continue(url: str, part: Path, stall_seconds: float) -> bool:
    """Append what one connection brings; whether the file is then as long as the server says (if it says)."""
    start = _size(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "clip_jax"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=stall_seconds) as response:
        continued = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        start = start if continued else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with part.open("ab" if continued else "wb") as file, bar:
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > MAX_BYTES:
                    raise UserError(f"{url} sent more than {MAX_BYTES} bytes, which none of OpenAI's files has")
    return total is None or _size(part) >= total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
