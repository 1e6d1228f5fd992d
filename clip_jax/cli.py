"""What the three scripts share: reading a config file with overrides, and turning mistakes into exit code 2."""

import argparse
import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clip_jax.errors import UserError
from clip_jax.platform import keep_libtpu_quiet

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main(argv)` and exit: 0 (or what it returns), 2 with one line for a user's mistake."""
    keep_libtpu_quiet()
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Parse flags, load the config that --config names and apply every --config.field=value.

    Raises:
      UserError: unknown config, misspelt field, or a value of the wrong type.
    """
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME",
        help=f"a file in configs/ without .py ({', '.join(config_names())}) or a path; "
        "--config.FIELD=VALUE overrides one value, for example --config.optimizer.learning_rate=1e-4",
    )
    flags, rest = parser.parse_known_args(argv)
    return flags, override(load_config(flags.config), _assignments(rest, parser))


def config_names() -> list[str]:
    """The configs that come with the project."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def load_config(name: str) -> ConfigDict:
    """The configuration that a file's `get_config()` returns; the file is Python and is run.

    Raises:
      UserError: there is no such file, or it has no get_config.
    """
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file() or (not name.endswith(".py") and name not in config_names()):
        raise UserError(f"unknown config {name!r}; expected a path or one of {', '.join(config_names())}")
    spec = importlib.util.spec_from_file_location(f"clip_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no function get_config()")
    return module.get_config()


def override(config: ConfigDict, assignments: Sequence[tuple[str, str]]) -> ConfigDict:
    """A copy of `config` with some fields replaced; values take the type of what they replace.

    Raises:
      UserError: unknown field (with the nearest ones), or a value that is not of the field's type.
    """
    config = config.copy_and_resolve_references()
    for field, text in assignments:
        fields = _fields(config)
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=3) or sorted(fields)
            raise UserError(f"the config has no field {field!r}; did you mean {', '.join(near)}?")
        parent, _, leaf = field.rpartition(".")
        node = config
        for name in parent.split(".") if parent else ():
            node = node[name]
        with node.ignore_type():
            node[leaf] = _parse_like(fields[field], text, field)
    return config


def _assignments(rest: Sequence[str], parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """["--config.a=1", "--config.b", "2"] -> [("a", "1"), ("b", "2")]."""
    pairs, arguments = [], iter(rest)
    for argument in arguments:
        if not argument.startswith("--config."):
            parser.error(f"unrecognized argument: {argument}")
        field, equals, value = argument.removeprefix("--config.").partition("=")
        pairs.append((field, value if equals else next(arguments, "")))
    return pairs


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name; groups of fields too, which a literal such as {'digits': {}} replaces."""
    fields = {}
    for key, value in config.items():
        fields[prefix + key] = value
        if isinstance(value, ConfigDict):
            fields.update(_fields(value, f"{prefix}{key}."))
    return fields


def _parse_like(old: Any, text: str, field: str) -> Any:
    """`text` as a value of the type of `old`; None gives way to anything."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, str):
        value = tuple(text.split(","))
    if isinstance(old, ConfigDict) and isinstance(value, dict):
        value = ConfigDict(value)
    if old is not None and type(value) is not type(old):
        example = old.to_dict() if isinstance(old, ConfigDict) else old
        raise UserError(f"config.{field} must be of type {type(example).__name__}, like {example!r}; got {text!r}")
    return value
