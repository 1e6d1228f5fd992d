"""What can be wrong with stored samples, by name, so that damage can be counted as well as refused."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from clip_jax.errors import UserError

REASONS = {
    "cut": "a file, shard or record that ends early",
    "header": "a block or record header that is not valid",
    "checksum": "content that does not match its checksum",
    "too_large": "a member, record or image beyond what is ever read",
    "link": "a link, device or other special member of a tar file",
    "unsafe_path": "a member with an absolute name, or one with ..",
    "duplicate_key": "a second sample of the same name in one shard",
    "image": "an image that is missing or cannot be decoded",
    "caption": "a caption that is missing, empty or not UTF-8",
    "label": "a label that is missing, or no class of its data set",
    "unreadable": "anything else that a source refuses",
}


NO_CAPTION = "expected at least one caption, got none"


class Damaged(UserError):
    """A sample, or a part of a shard, that cannot be used.

    Attributes:
      reason: one of `REASONS`.
    """

    def __init__(self, reason: str, message: str):
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # pickled between processes
        return type(self), (self.reason, str(self))


class Unreachable(UserError):
    """A bucket that does not answer, or refuses; no damage to the data, so it ends a run that skips damage as well."""


def counted(damage: Counter[str]) -> str:
    """Damage in words: "3 image, 1 cut"."""
    return ", ".join(f"{damage[reason]} {reason}" for reason in REASONS if damage[reason])


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say which file, offset and key an error of a user's data comes from; every such error leaves as `Damaged`.

    What is `Unreachable` says so by itself, and stays what it is.
    """
    try:
        yield
    except Unreachable:
        raise
    except Damaged as error:
        raise Damaged(error.reason, f"{where}: {error}") from error
    except (UserError, OSError) as error:
        raise Damaged("unreadable", f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"while reading {where}")
        raise


def of_example(key: str) -> AbstractContextManager[None]:
    """Say which example an error comes from by its key, if it has one."""
    return naming(f"key {key!r}") if key else nullcontext()


@contextmanager
def image_damage() -> Iterator[None]:
    """What images are refused for leaves as damage of that kind."""
    try:
        yield
    except UserError as error:
        raise Damaged("image", str(error)) from error
