"""Requests to buckets by way of fsspec: again where they fail for a while, one clear line where they fail for good."""

import functools
import io
import logging
import random
import time
from typing import Any

from clip_jax.data.damage import Unreachable
from clip_jax.errors import UserError

logger = logging.getLogger(__name__)

_PATIENCE = 120.0  # seconds in which what a bucket does not answer is asked again
_PAUSES = (1.0, 30.0)  # seconds before the first retry, and at most before a later one
_SILENCE = 30.0  # seconds without a byte before a connection counts as dead

_LOG_IN = {
    "gs": "log in with `gcloud auth application-default login`, or let GOOGLE_APPLICATION_CREDENTIALS name a key file",
    "s3": "log in with `aws configure`, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_REFUSALS = ("NoCredentialsError", "DefaultCredentialsError", "RefreshError", "ParamValidationError")


def ask(url: str, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of a URL's file system; again, with pauses, where that fails.

    The libraries below retry by themselves: gcsfs for half a minute, s3fs for some seconds.

    Args:
      url: its first argument.
      method: its name, such as `cat_file`.
      *args: its other arguments.
      **options: its other arguments, by name.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the package for this kind of URL is missing, or nobody knows the kind.
      Unreachable: the bucket does not answer, or refuses.
    """
    pause, longest = _PAUSES
    system, began = _file_system(url), time.monotonic()
    while True:
        try:
            return getattr(system, method)(url, *args, **options)
        except FileNotFoundError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            if _is_refusal(error):
                raise Unreachable(f"{url} is refused ({reason}){_how_to_log_in(url)}") from error
            if time.monotonic() - began >= _PATIENCE:
                raise Unreachable(f"{url} cannot be reached ({reason}); start again when it can") from error
            logger.warning("%s cannot be reached (%s), trying again", url, reason)
        time.sleep(pause * random.uniform(0.5, 1))  # not all hosts at once
        pause = min(2 * pause, longest)


class Stream(io.RawIOBase):
    """A file in a bucket as a stream that can be searched, for libraries that read one; each reading is a request.

    Args:
      url: of the file.
      size: in bytes; by default, the bucket is asked.

    Raises:
      OSError: there is no such file.
      UserError: see `ask`, also for its methods.
    """

    def __init__(self, url: str, size: int | None = None):
        self._url, self._offset = url, 0
        self._size = ask(url, "size") if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def readinto(self, buffer) -> int:
        end = min(self._offset + len(buffer), self._size)
        piece = ask(self._url, "cat_file", start=self._offset, end=end) if end > self._offset else b""
        buffer[: len(piece)] = piece
        self._offset += len(piece)
        return len(piece)


def _file_system(url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **_options(_scheme(url)))[0]
    except ImportError as error:
        raise UserError(f"{url}: {error}: run `pip install gcsfs` for gs://, `pip install s3fs` for s3://") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


@functools.cache
def _options(scheme: str) -> dict[str, Any]:
    """Listings as they are now; of gcsfs silence about what it raises, and an end to stalled connections as in s3fs."""
    options = {"use_listings_cache": False}
    if scheme == "gs":
        from aiohttp import ClientTimeout

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        options["requests_timeout"] = ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)
    return options


def _is_refusal(error: Exception) -> bool:
    """Whether there is no point in asking again: no credentials, or not allowed."""
    forbidden = getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden")  # gcsfs
    return forbidden or isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS


def _how_to_log_in(url: str) -> str:
    scheme = _scheme(url)
    return f": {_LOG_IN[scheme]}" if scheme in _LOG_IN else ""


def _scheme(url: str) -> str:
    scheme = url.partition("://")[0]
    return "gs" if scheme == "gcs" else scheme
