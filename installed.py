"""What the scripts import first: where the requirements are missing, it says so in one line and ends the process."""

import sys

try:
    import clip_jax  # noqa: F401
except ModuleNotFoundError as error:
    print(
        f"error: {error}: {sys.executable} has not got what clip_jax needs; call .venv/bin/python {sys.argv[0]} ... "
        "(`make demo` makes .venv), or pip install -r requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)
