"""TensorFlow Datasets by name: opened where they are prepared, prepared by TFDS itself where they are missing."""

import contextlib
import difflib
import io
import json
import logging
import shlex

import tensorflow_datasets as tfds  # brings no TensorFlow along until a data set is prepared

from clip_jax.data.access import Access
from clip_jax.errors import UserError

_log = logging.getLogger(__name__)

_FORMAT = "array_record"  # what is prepared here: read at random, without an index


class UnknownDataSet(UserError):
    """Neither the files nor the installed TFDS know a data set of that name."""


def open_builder(name: str, access: Access) -> tfds.core.DatasetBuilder:
    """Open a data set from its files alone; where there are none, let TFDS fetch and prepare them.

    Processes that prepare the same data set at once each work in a folder of their own, and the first to finish gives
    its folder to all.

    Args:
      name: as TFDS spells it: `cifar10`, `coco_captions/2017`, `mnist:3.0.1`, `my_dataset/config:1.0.0`.
      access: where TFDS keeps its data sets, and whether it may fetch this one.

    Raises:
      UnknownDataSet: TFDS knows no such data set, version or configuration.
      UserError: it is not prepared and may not be or cannot be; the message says what to do.
    """
    if builder := prepared(name, access.data_dir):
        return builder
    builder = _from_code(name, access.data_dir)
    if access.offline:
        raise UserError(
            f"the TFDS data set {name} is not prepared in {_folder(access.data_dir)} and --offline fetches none: "
            f"where there is a network, leave --offline out or run {preparation(name, access.data_dir)}"
        )
    _log.info(
        "TFDS prepares %s in %s: it downloads %s and takes %s on disk",
        builder.info.full_name,
        builder.data_dir,
        _download_size(builder),
        _gib(builder.info.dataset_size),
    )
    prepare(builder)
    return prepared(name, access.data_dir) or builder


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Fetch and write a data set that is missing; nothing is left behind that is not whole.

    Raises:
      UserError: TFDS could not, for a reason that the message gives.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces downloads there; results belong there
            builder.download_and_prepare()
    except Exception as error:  # code of several hundred authors fails in whatever way it likes
        if not builder.data_path.exists():  # otherwise another process was quicker
            raise UserError(
                f"TFDS cannot prepare {builder.info.full_name} in {builder.data_dir}: {_first_lines(error)}"
                f"{_manual_steps(builder)}"
            ) from error


def preparation(name: str, data_dir: str) -> str:
    """The command that fetches and prepares a data set, for a shell."""
    arguments = [json.dumps(name), f'file_format="{_FORMAT}"', *([f"data_dir={json.dumps(data_dir)}"] * bool(data_dir))]
    statement = f"import tensorflow_datasets as tfds; tfds.builder({', '.join(arguments)}).download_and_prepare()"
    return f"python -c {shlex.quote(statement)}"


def prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder | None:
    """What lies in the folder under that name, or None."""
    try:
        tfds.core.naming.parse_builder_name_kwargs(name, data_dir=data_dir)
    except (ValueError, TypeError) as error:
        raise UnknownDataSet(
            f"{name!r} names no TFDS data set: expected NAME, NAME/CONFIGURATION, or one of them with :1.2.3"
        ) from error
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except tfds.core.registered.DatasetNotFoundError:
        return None
    except ValueError as error:  # it was written by a TFDS of old, or lies in several places
        raise UserError(f"the TFDS data set {name} cannot be opened: {_first_lines(error)}") from error


def _from_code(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder that the installed TFDS has for a name, with nothing fetched yet."""
    parsed, choice = tfds.core.naming.parse_builder_name_kwargs(name)
    unknown = f"the TFDS data set {name!r} is not prepared in {_folder(data_dir)}"
    if parsed.namespace:
        raise UnknownDataSet(f"{unknown}, and code from {parsed.namespace} is not run here: prepare it yourself")
    try:
        code = tfds.builder_cls(parsed.name)
    except tfds.core.registered.DatasetNotFoundError as error:
        near = _nearest(parsed.name, tfds.list_builders(with_community_datasets=False))
        raise UnknownDataSet(f"{unknown}, and TFDS knows none of that name{near}") from error
    config = choice.get("config", "")
    if config and config not in code.builder_configs:
        near = _nearest(config, list(code.builder_configs)) or "; it has none"
        raise UnknownDataSet(f"{unknown}, and {parsed.name} has no configuration {config!r}{near}")
    try:
        return tfds.builder(name, data_dir=data_dir or None, file_format=_FORMAT)
    except Exception as error:  # a version that the code does not make, or a package that it needs
        raise UnknownDataSet(f"{unknown}, and TFDS cannot make it: {_first_lines(error)}") from error


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, cutoff=0.5) or known[:3]
    return f"; the nearest are {', '.join(near)}" if near else ""


def _download_size(builder: tfds.core.DatasetBuilder) -> str:
    """As TFDS recorded it, or else what the files of all its configurations come to."""
    if builder.info.download_size:
        return _gib(builder.info.download_size)
    try:
        sizes = [info.size or 0 for info in (builder.url_infos or {}).values()]
    except Exception:  # the list of a builder of one's own is missing or damaged: the size is only told
        sizes = []
    return f"at most {_gib(sum(sizes))}" if all(sizes) and sizes else _gib(0)


def _gib(size: int | None) -> str:
    return f"{size / 2**30:.2f} GiB" if size else "an unknown number of GiB"


def _manual_steps(builder: tfds.core.DatasetBuilder) -> str:
    steps = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    return f"; it needs files that only you can fetch: {' '.join(steps.split())}" if steps else ""


def _first_lines(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _folder(data_dir: str) -> str:
    return data_dir or tfds.core.constants.DATA_DIR
