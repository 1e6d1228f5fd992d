"""What a disk or bucket refuses, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clip_jax.errors import RunStopped, UserError

# Ours, not the storage's. Everything else is: file systems, TensorStore, TensorFlow and gcsfs have no common type.
_FAULTS = (TypeError, AttributeError, NameError, AssertionError)


@contextmanager
def storage(action: str, what: Any) -> Iterator[None]:
    """Say which action on what failed, and how the run goes on.

    Raises:
      RunStopped: in place of what the storage raised.
    """
    try:
        yield
    except (UserError, RunStopped, *_FAULTS):
        raise
    except Exception as error:
        raise RunStopped(
            f"cannot {action} {what}: {_shortened(error)}; what was saved before is untouched: mend that, and run the "
            "same command again to go on"
        ) from error


def _shortened(error: Exception) -> str:
    """The end of the first line of an exception, where TensorStore says what the system said."""
    line = str(error).strip().split("\n")[0].partition(" [os_error_code")[0] or type(error).__name__
    return line if len(line) <= 200 else f"... {line[-200:]}"
