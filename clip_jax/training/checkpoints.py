"""Checkpoints of a run: model folders under WORKDIR/checkpoints with the training state beside the model.

  STEP/description, STEP/variables   the model (clip_jax/model_folder.py)
  STEP/opt_state                     the rest of the state that the next step needs, an item each
  STEP/run/run.json                  step, configuration, versions, and the digests of the rest of the state
  STEP/files.json                    all files, with their checksums (manifest.py)

A checkpoint that is damaged is set aside in WORKDIR/damaged, and the one before it used.
"""

import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, Bool

from clip_jax import model_folder
from clip_jax.digests import digest, digests
from clip_jax.distributed import on_first_process, refused_by_any
from clip_jax.errors import DamagedFile, RunStopped, UserError
from clip_jax.model_folder import VARIABLES
from clip_jax.options import to_dict
from clip_jax.sealed_json import check_seal, read_object, sealed
from clip_jax.training.config import RunConfig
from clip_jax.training.manifest import MANIFEST, check_manifest, file_names, write_manifest
from clip_jax.training.state import TrainState
from clip_jax.workdir import CHECKPOINTS, absolute, best_step

logger = logging.getLogger(__name__)

DAMAGED = "damaged"
RUN, RUN_FILE, _VERSION = "run", "run.json", 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# What Orbax, TensorStore and file systems raise.
_STORAGE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """The checkpoints of one workdir: the newest few, every so many steps one, and the best of the evaluated.

    Saving is asynchronous; `close` waits for what is under way. All processes of a run call the same methods together.
    """

    def __init__(self, workdir: epath.PathLike, config: RunConfig):
        self._workdir, self._config = absolute(workdir), config
        self._folder = self._workdir / CHECKPOINTS
        self._manager, self._saving = self._open(), 0

    def _open(self) -> ocp.CheckpointManager:
        keep = _Keep(self._workdir, self._config.keep_checkpoints, self._config.keep_every)
        rest = {name: ocp.StandardCheckpointHandler() for name in _rest_names()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._list_files),
        )
        handlers = {**model_folder.handlers(), **rest, RUN: ocp.JsonCheckpointHandler(RUN_FILE)}
        return ocp.CheckpointManager(self._folder, item_handlers=handlers, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Write `state` as the checkpoint of `step`, unless it is there already or has numbers that are not finite.

        Raises:
          RunStopped: it, or the one before, cannot be written.
        """
        if step == self.latest_step():
            return
        if not _is_finite(state):
            logger.warning("step %d is not saved: it has numbers that are not finite", step)
            return
        rest = _rest(state)
        items = {
            **model_folder.items(self._config.model, state.variables, digests(state.variables)),
            **{name: ocp.args.StandardSave(value) for name, value in rest.items()},
            RUN: ocp.args.JsonSave(_description(step, self._config, digests(rest))),
        }
        with self._storage("write"):
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that is whole; None if none was ever written.

        Args:
          like: shapes, dtypes and shardings that are wanted, whatever devices the checkpoint was written from.

        Raises:
          UserError: the checkpoint is of another model.
          RunStopped: no checkpoint is whole, or none can be read.
        """
        while (step := self.latest_step()) is not None:
            try:
                return self._restore(step, like)
            except DamagedFile as damage:
                self._set_aside(step, damage)
        if not (self._workdir / DAMAGED).exists():
            return None
        raise RunStopped(
            f"every checkpoint of {self._workdir} is damaged (they are in {self._workdir / DAMAGED}): put a copy of "
            f"one into {self._folder}, or begin again in another --workdir"
        )

    def wait(self) -> None:
        """Wait for saves under way.

        Raises:
          RunStopped: one failed.
        """
        with self._storage("write"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves under way, and end.

        Raises:
          RunStopped: one failed.
        """
        with self._storage("write"):
            self._manager.close()

    def _list_files(self) -> None:
        """Orbax calls this in the background, when all is written and before it commits the checkpoint."""
        if jax.process_index() == 0:
            unfinished = list(self._folder.glob(f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}*"))  # none in a bucket
            write_manifest(unfinished[0] if unfinished else self._folder / str(self._saving))

    def _restore(self, step: int, like: TrainState) -> TrainState:
        folder = self._folder / str(step)
        listed = _is_listed(folder)
        with self._storage("read"), _together(folder):
            if listed:
                check_manifest(folder, jax.process_index(), jax.process_count())
        rest = {name: value for name, value in _rest(like).items() if (folder / name).is_dir()}
        with _together(folder):
            restored = self._arrays(step, like.variables, rest, listed)
        with _together(folder):
            model_folder.check_digests(folder, restored[VARIABLES])
            _check_rest(folder, step, digests({name: restored[name] for name in rest}))
        variables = restored.pop(VARIABLES)
        return like.replace(
            step=jax.device_put(np.int32(step), like.step.sharding),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            **restored,
        )

    def _arrays(self, step: int, variables: Any, rest: Mapping[str, Any], listed: bool) -> dict[str, Any]:
        """The model's arrays and the rest, by item, onto the devices where those that are given are."""
        folder = self._folder / str(step)
        restore_args = ocp.checkpoint_utils.construct_restore_args(variables)
        items = {
            VARIABLES: ocp.args.PyTreeRestore(variables, restore_args=restore_args),
            **{name: ocp.args.StandardRestore(value) for name, value in rest.items()},
        }
        try:
            _check_shapes(self._manager.item_metadata(step)[VARIABLES], variables, folder)
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for missing, cut and altered files
            if listed:  # all files are as they were written, so that is not why
                raise
            raise DamagedFile(model_folder.damage(folder, error)) from error

    def _set_aside(self, step: int, damage: DamagedFile) -> None:
        """Move a damaged checkpoint out of the way of the run, which will write that step again."""
        self._manager.close()
        target = self._workdir / DAMAGED / str(step)

        def move() -> None:
            free = next(path for path in _numbered(target) if not path.exists())
            _move(self._folder / str(step), free)
            logger.warning("%s; set aside as %s, going back to the checkpoint before", damage, free)

        with self._storage("set aside"):
            on_first_process(move)
        self._manager = self._open()

    @contextmanager
    def _storage(self, verb: str) -> Iterator[None]:
        """What the disk or bucket refuses, as one line."""
        try:
            yield
        except UserError:
            raise
        except _STORAGE_ERRORS as error:
            steps = sorted(ocp.utils.checkpoint_steps(self._folder)) if self._folder.is_dir() else []
            safe = f"step {steps[-1]} is safe" if steps else "none is there yet"
            raise RunStopped(
                f"cannot {verb} a checkpoint in {self._folder}: {_shortened(error)}; {safe}; "
                "mend that, and run the same command again to go on"
            ) from error


def config_of_newest(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The configuration in the newest checkpoint that has a readable one; None if there is none."""
    folder = absolute(workdir) / CHECKPOINTS
    for step in sorted(ocp.utils.checkpoint_steps(folder), reverse=True) if folder.is_dir() else []:
        try:
            return read_description(folder / str(step))["config"]
        except DamagedFile:
            continue
    return None


def has_checkpoint(workdir: epath.PathLike) -> bool:
    """Whether `workdir` holds a complete checkpoint."""
    folder = absolute(workdir) / CHECKPOINTS
    return folder.is_dir() and bool(ocp.utils.checkpoint_steps(folder))


def read_description(folder: epath.Path) -> dict[str, Any]:
    """What run.json of a checkpoint says: version, step, config, made_with, digests.

    Raises:
      DamagedFile: it is missing or damaged.
    """
    file = folder / RUN / RUN_FILE
    values = read_object(file)
    check_seal(values, file)
    return values


def verify(folder: epath.Path) -> None:
    """Compare a checkpoint's files and arrays with what was written, on this host alone.

    Raises:
      DamagedFile: a file or an array is missing or altered; the message names it.
      UserError: its model is not usable.
    """
    if _is_listed(folder):
        check_manifest(folder)
    model_folder.read(folder)
    rest = {name: _read_arrays(folder / name) for name in _rest_names() if (folder / name).is_dir()}
    paths = jax.tree_util.tree_leaves_with_path(rest)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): digest(array) for path, array in paths}
    _check_rest(folder, int(folder.name), found)


def _is_listed(folder: epath.Path) -> bool:
    """Whether a checkpoint is of a version that lists its files and the digests of all arrays."""
    return (folder / MANIFEST).exists() or (folder / RUN).exists()


def _read_arrays(folder: epath.Path) -> Any:
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(folder).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:
        raise DamagedFile(model_folder.damage(folder, error)) from error


def _check_rest(folder: epath.Path, step: int, found: Mapping[str, str]) -> None:
    """Compare the digests of the rest of the state with those that were written."""
    if not _is_listed(folder):
        return
    written = read_description(folder)
    if written["step"] != step:
        raise DamagedFile(f"{folder} is damaged: it is the checkpoint of step {written['step']}")
    altered = sorted(path for path, value in found.items() if written["digests"].get(path) != value)
    missing = sorted(written["digests"].keys() - found.keys())
    if altered or missing:
        raise DamagedFile(f"{folder} is damaged: {(altered + missing)[0]} is not what was written")


def _description(step: int, config: RunConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    made_with = {name: importlib.metadata.version(name) for name in _PACKAGES}
    config = json.loads(json.dumps(to_dict(config)))  # as it will be read
    return sealed({"version": _VERSION, "step": step, "config": config, "made_with": made_with, "digests": digests})


def _rest_names() -> list[str]:
    """The fields of the state that are neither the model nor the step."""
    return [item.name for item in fields(TrainState) if item.name not in ("step", "params", "batch_stats")]


def _rest(state: TrainState) -> dict[str, Any]:
    rest = {name: getattr(state, name) for name in _rest_names()}
    return {name: value for name, value in rest.items() if jax.tree.leaves(value)}


@contextmanager
def _together(folder: epath.Path) -> Iterator[None]:
    """What one process finds damaged, all do."""
    damage = None
    try:
        yield
    except DamagedFile as error:
        damage = error
    if refused_by_any(damage is not None) and damage is None:
        raise DamagedFile(f"{folder} is damaged, as another process says")
    if damage is not None:
        raise damage


@dataclass(frozen=True)
class _Keep:
    """Orbax's question which checkpoints to keep, answered from the configuration and the workdir's metrics."""

    workdir: epath.Path
    newest: int
    every: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.newest :], best_step(self.workdir, steps)}
        return [step in kept or (self.every > 0 and step % self.every == 0) for step in steps]


def _check_shapes(stored: Any, expected: Any, folder: epath.Path) -> None:
    """Refuse a checkpoint whose arrays are not those of the model, naming the first of them."""
    stored_shapes, expected_shapes = _shapes(stored), _shapes(expected)
    wrong = [
        f"{name} ({stored_shapes.get(name, 'missing')}, expected {expected_shapes.get(name, 'none')})"
        for name in sorted(set(stored_shapes) | set(expected_shapes))
        if stored_shapes.get(name) != expected_shapes.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder} is a checkpoint of another model: {', '.join(wrong[:3])}{more}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


@jax.jit
def _is_finite(state: TrainState) -> Bool[Array, ""]:
    """Of the model and the optimizer's state; the guard uses NaN for what is not there yet."""
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state, state.ema))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _move(folder: epath.Path, target: epath.Path) -> None:
    """Move a folder, in a bucket object by object."""
    if "://" not in str(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return
    for name in file_names(folder):
        (folder / name).copy(target / name)
    folder.rmtree()


def _numbered(path: epath.Path) -> Iterator[epath.Path]:
    """path, path.1, path.2, ..."""
    yield path
    number = 0
    while True:
        number += 1
        yield path.with_name(f"{path.name}.{number}")


def _shortened(error: Exception) -> str:
    """The end of the first line of an exception, where TensorStore says what the system said."""
    line = str(error).strip().split("\n")[0].partition(" [os_error_code")[0] or type(error).__name__
    return line if len(line) <= 200 else f"... {line[-200:]}"
