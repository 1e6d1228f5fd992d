"""A model is one thing: a folder that holds all there is to know about it.

  FOLDER/description/clip_jax.json   architecture, image processing, tokenizer, digest of each array, format version
  FOLDER/variables/                  the parameters, in Orbax's format

Conversion writes it, and so does training at every checkpoint, with the training state beside it. Orbax restores
flipped bits without a word; the digests, which also cover the description, do not let them pass. `FOLDER@ema` is the
model with the moving average of its weights, which a checkpoint may hold:

  FOLDER/ema/            the averaged parameters
  FOLDER/run/run.json    their digests
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax import workdir
from clip_jax.digests import digest
from clip_jax.errors import DamagedFile, UserError
from clip_jax.models import CLIPConfig, variable_shapes
from clip_jax.sealed_json import check_seal, read_object, sealed
from clip_jax.workdir import CHECKPOINTS, EMA, RUN_CONFIG, absolute, without_suffixes

VERSION = 2
DESCRIPTION, VARIABLES, PARAMS = "description", "variables", "params"
DESCRIPTION_FILE = "clip_jax.json"
AVERAGE, RUN, RUN_FILE = "ema", "run", "run.json"  # what training puts beside the model

Description = tuple[CLIPConfig, Callable[[str, np.ndarray], bool]]


def handlers() -> dict[str, Any]:
    """Orbax's handlers of the folder's items."""
    import orbax.checkpoint as ocp

    # Compression would save a third of weights that were float16, and take several times as long to read.
    variables = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    return {DESCRIPTION: ocp.JsonCheckpointHandler(DESCRIPTION_FILE), VARIABLES: variables}


def description_of(config: CLIPConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    """What clip_jax.json says of a model."""
    return sealed({"version": VERSION, "model": config.to_dict(), "digests": digests})


def items(config: CLIPConfig, variables: Any, digests: Mapping[str, str]) -> dict[str, Any]:
    """What to save of a model, by item."""
    import orbax.checkpoint as ocp

    description = description_of(config, digests)
    return {DESCRIPTION: ocp.args.JsonSave(description), VARIABLES: ocp.args.PyTreeSave(variables)}


def write(folder: epath.PathLike, config: CLIPConfig, variables: Any) -> None:
    """Write a model; the folder appears when it is complete.

    Raises:
      UserError: `folder` exists, or cannot be written.
    """
    import orbax.checkpoint as ocp

    folder = absolute(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or choose another name")
    flat = {path: np.asarray(array, np.float32) for path, array in flatten_dict(variables, sep="/").items()}
    saved = items(config, unflatten_dict(flat, sep="/"), {path: digest(array) for path, array in flat.items()})
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers())) as checkpointer:
            checkpointer.save(folder, args=ocp.args.Composite(**saved))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def find(path: epath.PathLike) -> epath.Path | None:
    """The model folder that `path` means: itself, the newest step of a workdir, or its best step (`WORKDIR@best`).

    A path that ends in `@ema` keeps that ending: `read` takes it.

    Raises:
      UserError: a workdir without a finished checkpoint, or without an evaluated one where the best is asked for; or
        `@ema` after what is no model folder.
    """
    bare, _, averaged = workdir.without_suffixes(path)
    in_workdir = workdir.is_meant(path)
    folder = workdir.step_folder(path) if in_workdir else absolute(bare)
    is_model = (folder / DESCRIPTION).is_dir() or (folder / DESCRIPTION_FILE).is_file() or _has_run_config(folder)
    if in_workdir or is_model:
        return epath.Path(f"{folder}{EMA}") if averaged else folder
    if averaged:
        raise UserError(f"{bare} is no training checkpoint, and only these keep an average; leave {EMA} out")
    return None


def read_config(folder: epath.PathLike) -> CLIPConfig:
    """What the model in a folder is, without its parameters.

    Raises:
      UserError: the description is damaged, or of another version.
    """
    return _describe(absolute(without_suffixes(folder)[0]))[0]


def read(folder: epath.PathLike) -> tuple[CLIPConfig, Any]:
    """The model in a folder: (config, variables as float32 NumPy arrays); of `FOLDER@ema` with averaged parameters.

    Raises:
      UserError: of another version, damaged, or not the parameters that the description asks for; or there is no
        average.
    """
    bare, _, averaged = without_suffixes(folder)
    folder = absolute(bare)
    config, is_intact = _describe(folder)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(variable_shapes(config), sep="/").items()}
    averages = _read_averages(folder, shapes) if averaged else {}
    rest = {path: shape for path, shape in shapes.items() if path not in averages}
    return config, unflatten_dict(_read_arrays(folder, VARIABLES, rest, is_intact) | averages, sep="/")


def _read_averages(folder: epath.Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The averaged arrays of a checkpoint by their path in the model; what was not trained has no average."""
    file = folder / RUN / RUN_FILE
    written = {}
    if file.exists() or (folder / AVERAGE).exists():
        values = _read_json(file, {"digests"})
        check_seal(values, file)
        written = values["digests"]
    prefix = f"{AVERAGE}/"
    digests = {name.removeprefix(prefix): value for name, value in written.items() if name.startswith(prefix)}
    if not digests:
        raise UserError(f"{folder} holds no average of the weights (a run with ema_decay keeps one); leave {EMA} out")
    arrays = _read_arrays(
        folder,
        AVERAGE,
        {path: shapes.get(f"{PARAMS}/{path}") for path in digests},
        lambda path, array: digests[path] == digest(array),
    )
    return {f"{PARAMS}/{path}": array for path, array in arrays.items()}


def _read_arrays(
    folder: epath.Path,
    item: str,
    shapes: Mapping[str, tuple[int, ...] | None],
    is_intact: Callable[[str, np.ndarray], bool],
) -> dict[str, np.ndarray]:
    """The arrays of one item, each checked."""
    stored = {path: _open_array(folder, item, path) for path in shapes}
    arrays = {}
    for path, shape in shapes.items():
        name = f"{item}/{path}"
        try:
            arrays[path] = stored[path].result().read().result()
        except ValueError as error:
            raise DamagedFile(f"{folder} is damaged: {name} cannot be read ({str(error)[:300]}); {_ADVICE}") from error
        if arrays[path].shape != shape or not is_intact(path, arrays[path]):
            raise DamagedFile(f"{folder} is damaged: {name} is not what was written; {_ADVICE}")
        if not np.isfinite(arrays[path]).all():
            raise UserError(f"{folder} holds no usable model: {name} has numbers that are NaN or infinite")
    return arrays


def _open_array(folder: epath.Path, item: str, path: str) -> Any:
    """The future of one array in Orbax's format. Orbax reads all at once, and cannot say which of them is damaged."""
    import tensorstore

    folder_url = f"{folder}" if "://" in str(folder) else f"file://{folder}"
    store = {"driver": "ocdbt", "base": f"{folder_url}/{item}/", "path": path.replace("/", ".") + "/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True)


def check_digests(folder: epath.Path, found: Mapping[str, str]) -> None:
    """Compare digests of arrays that were restored onto devices with the folder's.

    Raises:
      UserError: an array is not what was written; the message names it.
    """
    if not (folder / DESCRIPTION).is_dir():
        return _check_not_lost(folder)
    expected = _load(folder)["digests"]
    altered = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
    if altered:
        raise DamagedFile(f"{folder} is damaged: {altered[0]} is not what was written; {_ADVICE}")


def damage(folder: epath.Path, error: Exception) -> str:
    """What to say of an exception that Orbax raised when reading."""
    return f"{folder} is damaged ({type(error).__name__}: {str(error)[:300]}); {_ADVICE}"


_ADVICE = "convert it again, or remove this checkpoint to go on from the one before"


def _describe(folder: epath.Path) -> Description:
    """The config, and what tells whether an array of a path is what was written; of every version so far."""
    if (folder / DESCRIPTION).is_dir():
        values = _load(folder)
        return CLIPConfig.from_dict(values["model"]), lambda path, array: values["digests"].get(path) == digest(array)
    if (folder / DESCRIPTION_FILE).is_file():  # version 1, of conversion
        values = _read_json(folder / DESCRIPTION_FILE, {"config", "crc32"})
        return CLIPConfig.from_dict(values["config"]), lambda path, array: values["crc32"].get(path) == _crc32(array)
    _check_not_lost(folder)
    values = _read_json(folder.parent.parent / RUN_CONFIG, {"model"})  # before version 1, of training
    return CLIPConfig.from_dict(values["model"]), lambda path, array: True


def _load(folder: epath.Path) -> dict[str, Any]:
    file = folder / DESCRIPTION / DESCRIPTION_FILE
    values = _read_json(file, {"model", "digests"})
    if values.get("version") != VERSION:
        raise UserError(f"{folder} is a model of version {values.get('version')!r}, this clip_jax reads {VERSION}")
    check_seal(values, file)
    return values


def _read_json(file: epath.Path, keys: set[str]) -> dict[str, Any]:
    """A JSON object that has `keys`, whose values are objects themselves."""
    values = read_object(file)
    wrong = [f"{key} is {values.get(key)!r:.50}" for key in sorted(keys) if not isinstance(values.get(key), dict)]
    if wrong:
        raise DamagedFile(f"{file} is damaged: {wrong[0]}; {_ADVICE}")
    return values


def _has_run_config(folder: epath.Path) -> bool:
    """Whether `folder` is a step of a workdir: before the model folder, config.json alone said what the model is."""
    in_workdir = folder.parent.name == CHECKPOINTS and (folder.parent.parent / RUN_CONFIG).is_file()
    return in_workdir and (folder / VARIABLES).is_dir()


def _check_not_lost(folder: epath.Path) -> None:
    """Tell a step that never had a description from one that lost it."""
    written = folder / "_CHECKPOINT_METADATA"  # where Orbax notes what it saved
    if written.is_file() and f'"{DESCRIPTION}"' in written.read_text():
        raise DamagedFile(f"{folder} is damaged: its {DESCRIPTION} is missing; {_ADVICE}")


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8))
