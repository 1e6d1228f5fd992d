"""What the scripts share: reading a config file with overrides, saying events, and mistakes as exit code 2."""

import argparse
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clip_jax import options
from clip_jax.errors import RunStopped, UserError
from clip_jax.platform import keep_libtpu_quiet

if TYPE_CHECKING:
    from clip_jax.training.config import RunConfig

INSTALL = "pip install -r requirements.txt"
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main(argv)` and exit: 0 (or what it returns), 2 with one line for a user's mistake, 1 for a stopped run."""
    keep_libtpu_quiet()
    _say_events()
    mistake = None
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        mistake, code = " ".join(str(error).split()), 2
    except RunStopped as stop:
        mistake, code = " ".join(str(stop).split()), stop.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("clip_jax"):
            raise
        mistake, code = f"{error}: {sys.executable} has not got all that the scripts need; {INSTALL}", 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # whoever reads what is printed, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if mistake:  # said only now that the exception is gone, and with it the progress bars that its frames kept open
        print(f"error: {mistake}", file=sys.stderr)
    sys.exit(code)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], needs_config: bool = True
) -> tuple[argparse.Namespace, "RunConfig | None"]:
    """Parse flags, load the config that --config names (if any) and apply every --config.field=value.

    Raises:
      UserError: unknown config, misspelt field, or a value of the wrong type.
    """
    parser.add_argument(
        "--config",
        required=needs_config,
        metavar="NAME",
        help=f"a file in configs/ without .py ({', '.join(config_names())}) or a path; "
        "--config.FIELD=VALUE overrides one value, for example --config.optimizer.learning_rate=1e-4",
    )
    parser.add_argument(
        "--help_config", action=_HelpConfig, nargs=0, help="print every field of a config, with its default"
    )
    parser.add_argument("--offline", action="store_true", help="fetch no data: a data set that is not here is refused")
    flags, rest = parser.parse_known_args(argv)
    overrides = assignments(rest, parser, "config")
    if flags.offline and flags.config is not None:
        overrides["offline"] = "true"
    if overrides and flags.config is None:
        raise UserError(f"--config.{next(iter(overrides))} overrides a value of a config; give --config NAME too")
    if flags.config is None:
        return flags, None
    return flags, load_config(flags.config, overrides, getattr(flags, "workdir", None))


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a script that runs as several processes; `join_processes` reads them."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, when started by hand")
    parser.add_argument("--processes", type=int, help="how many processes there are, when started by hand")
    parser.add_argument("--process_index", type=int, help="which of them this is, when started by hand")


def join_processes(flags: argparse.Namespace) -> None:
    """Make this process one of those that the flags, the TPU pod or Slurm know of; see `distributed.initialize`."""
    from clip_jax.distributed import initialize

    initialize(flags.coordinator, flags.processes, flags.process_index)


def config_names() -> list[str]:
    """The configs that come with the project."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def load_config(name: str, overrides: Mapping[str, str] | None = None, workdir: str | None = None) -> "RunConfig":
    """The run that a config file describes; the file is Python and is run.

    Args:
      name: of a file in configs/, or a path that ends in .py.
      overrides: from dotted names of options to the text of their values.
      workdir: of the run, if there is one already.

    Raises:
      UserError: there is no such file, it cannot be run, or a field is unknown, missing, or of another type.
    """
    from clip_jax.training.config import RunConfig
    from clip_jax.training.resolve import with_model

    values, origin, overrides = _file_values(name), f"config {name}", overrides or {}
    of_model = [field for field in overrides if field.startswith("model.")]  # on top of the model, wherever it is from
    for field in (field for field in overrides if field not in of_model):
        values = options.override(RunConfig, values, field, overrides[field], origin)
    values = with_model(values, workdir)
    for field in of_model:
        values = options.override(RunConfig, values, field, overrides[field], origin)
    return options.from_dict(RunConfig, values, origin)


def assignments(rest: Sequence[str], parser: argparse.ArgumentParser, group: str) -> dict[str, str]:
    """Arguments that set fields of a group: ["--config.a=1", "--config.b", "2"] -> {"a": "1", "b": "2"}."""
    pairs, arguments = {}, iter(rest)
    for argument in arguments:
        if not argument.startswith(f"--{group}."):
            parser.error(f"unrecognized argument: {argument}")
        field, equals, value = argument.removeprefix(f"--{group}.").partition("=")
        pairs[field] = value if equals else next(arguments, "")
    return pairs


def make_parent(path: str) -> None:
    """Make the folder of a file to be written, before the work, so that it is not missed after it.

    Raises:
      UserError: the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() or not os.access(target.parent, os.W_OK):
            raise OSError("it is a folder" if target.is_dir() else f"{target.parent} cannot be written to")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; name another file") from error


def _file_values(name: str) -> dict[str, Any]:
    """The plain values of what a config file's get_config() returns."""
    from ml_collections import ConfigDict

    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file() or (not name.endswith(".py") and name not in config_names()):
        raise UserError(f"unknown config {name!r}; expected a path or one of {', '.join(config_names())}")
    try:
        config = _module(path).get_config()
        values = config.to_dict() if isinstance(config, ConfigDict) else None
    except Exception as error:
        raise UserError(f"{_place(error, path)}: {type(error).__name__}: {error}") from error
    if values is None:
        raise UserError(f"{path}: get_config() must return an ml_collections.ConfigDict, got {config!r:.100}")
    return values


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"clip_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _place(error: Exception, path: Path) -> str:
    """FILE:LINE of the last line of `path` on the way to `error`; FILE if there is none."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


class _HelpConfig(argparse.Action):
    """--help_config: print every field of a config, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from clip_jax.data.sources import SOURCES
        from clip_jax.training.config import RunConfig

        print("Fields of a config file; --config.FIELD=VALUE overrides one. A resumed run may change those with a *.")
        print("Fields shown without a value are required.\n")
        print(options.describe({"": RunConfig, **{f"data.{kind}": source for kind, source in SOURCES.items()}}))
        parser.exit()


def _say_events() -> None:
    """What the library logs goes to stderr, above a progress bar that is being drawn."""
    from tqdm import tqdm

    class BesideTheBar(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger = logging.getLogger("clip_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(BesideTheBar())
    logger.propagate = False
    sys.excepthook = _without_late_answers(sys.excepthook)
    # Orbax logs tracebacks of what it raises as well; we say it in one line.
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _without_late_answers(hook: Callable[..., None]) -> Callable[..., None]:
    """`hook`, but for hundreds of tracebacks where a disk is full: TensorStore answers event loops that have ended.

    They end with the first write that fails, and that one is said.
    """

    def heard(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            hook(kind, error, trace)

    return heard
