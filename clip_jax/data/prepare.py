"""Turn any source into array records that TFDS opens: resized, filtered, without repeated images.

  python -m clip_jax.data.prepare folder:photos prepared --max_side 256
  python -m clip_jax.data.prepare 'tar:shards/{00000..00099}.tar' prepared --source.caption_field=alt --dedup exact

SRC is a kind of source and its path (or name, or split): folder:photos, tar:shards/*.tar, tfds:coco_captions/2017,
digits:train; the kind may be left out where the path shows it. --source.FIELD=VALUE sets its other fields, as
--config.data.KIND.FIELD does in training. The data set goes to DST/NAME. The same command continues what was stopped.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from clip_jax import cli
from clip_jax.data.preparation import report
from clip_jax.data.preparation.destination import Destination, default_name, is_taken
from clip_jax.data.preparation.job import Options, make_job
from clip_jax.data.preparation.runners import Beam, InProcess, Processes, Runner
from clip_jax.data.sources import SOURCES, SourceConfig, source_config
from clip_jax.errors import UserError
from clip_jax.options import override, walk
from clip_jax.platform import usable_cores

_PAGE = "report.html"

_SUFFIXES = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tfrecord": "tfrecord",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}


def main(argv: Sequence[str]) -> None:
    """Parse the flags, prepare, and say how the result is used."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="KIND:PATH, or a path that shows its kind")
    parser.add_argument("destination", metavar="DST", help="the folder of TFDS data sets that gets this one")
    parser.add_argument("--name", help="of the data set; by default what SRC is called")
    parser.add_argument("--processes", type=int, default=usable_cores(), help="of this machine (default: %(default)s)")
    parser.add_argument(
        "--beam", metavar="ARGUMENTS", help="work with Apache Beam; e.g. --beam='--runner=FlinkRunner ...'"
    )
    for name, item in walk(Options):
        parser.add_argument(
            f"--{name}", type=item.type, default=item.default, help=f"{item.metadata['help']} (default: %(default)s)"
        )
    flags, rest = parser.parse_known_args(argv)
    kind, config = parse_source(flags.source, cli.assignments(rest, parser, "source"))
    options = Options(**{item.name: getattr(flags, item.name) for item in fields(Options)})
    prepare(kind, config, options, _destination(flags, kind, config), _runner(flags))


def prepare(kind: str, config: SourceConfig, options: Options, destination: Destination, runner: Runner) -> None:
    """Prepare a source.

    Args:
      kind: of the source.
      config: its fields.
      options: what becomes of its samples.
      destination: where the data set goes.
      runner: who works.

    Raises:
      UserError: the source or the destination cannot be used, or too little can be kept.
    """
    from clip_jax.data.preparation.run import run  # imports TFDS
    from clip_jax.reports.preparation import write_preparation

    job = make_job(kind, config, options, destination.unfinished)

    def write_page(folder: str) -> None:
        write_preparation(os.path.join(folder, _PAGE), destination.name, report.read(folder), job.source)

    run(job, destination, runner, write_page)
    _say_what_is_next(destination)


def parse_source(text: str, more: Mapping[str, str]) -> tuple[str, SourceConfig]:
    """The kind of a source and its fields.

    Args:
      text: such as folder:photos or shards/*.tar.
      more: other fields, from their names to the text of their values.

    Raises:
      UserError: the kind is unknown or does not show, or a field cannot be set.
    """
    kind, colon, value = text.partition(":")
    if kind not in SOURCES:
        kind, colon, value = _kind_of(text), ":", text
    names = [item.name for item in fields(SOURCES[kind])]
    values: dict[str, Any] = {next(name for name in ("path", "name", "split") if name in names): value} if colon else {}
    for field, one in more.items():
        values = override(SOURCES[kind], values, field, one, f"source {kind}")
    return kind, source_config(kind, values)


def _kind_of(path: str) -> str:
    if os.path.isdir(path):
        return "folder"
    kind = next((kind for suffix, kind in _SUFFIXES.items() if path.endswith(suffix)), None)
    if kind not in SOURCES:
        raise UserError(
            f"{path} does not exist or does not show its kind; expected KIND:PATH, KIND of {', '.join(SOURCES)}"
        )
    return kind


def _destination(flags: argparse.Namespace, kind: str, config: SourceConfig) -> Destination:
    if "://" in flags.destination:
        raise UserError(f"DST must be a folder that this machine sees, got {flags.destination}: copy the result there")
    name = flags.name or default_name(kind, config)
    if not re.fullmatch(r"[a-z]\w*", name, re.ASCII):
        raise UserError(f"--name must be of small letters, digits and _, as TFDS wants it; got {name!r}")
    if is_taken(name):
        raise UserError(f"TFDS has a data set {name} of its own; choose another --name, such as my_{name}")
    split = re.match(r"\w*", getattr(config, "split", ""))[0] or "train"  # of train[:90%] or train+test, the first
    return Destination(os.path.abspath(flags.destination), name, split)


def _runner(flags: argparse.Namespace) -> Runner:
    if flags.processes < 1:
        raise UserError(f"--processes must be at least 1, got {flags.processes}")
    if flags.beam is not None:
        return Beam(flags.beam)
    return InProcess() if flags.processes == 1 else Processes(flags.processes)


def _say_what_is_next(destination: Destination) -> None:
    values = report.read(destination.finished)
    left_out = f"; left out: {report.words(values['left_out'])}" if values["left_out"] else ""
    print(f"{values['kept']:,} of {values['samples']:,} samples are in {destination.finished}{left_out}")
    print(f"What was left out, with samples: {os.path.join(destination.finished, _PAGE)}")
    fields = {"name": destination.name, "split": destination.split, "data_dir": destination.data_dir}
    print(f"In training:  {shlex.quote('--config.data=' + json.dumps({'tfds': fields}))}")
    print(
        f"In Python:    import tensorflow_datasets as tfds; "
        f"tfds.data_source({destination.name!r}, split={destination.split!r}, data_dir={destination.data_dir!r})"
    )


if __name__ == "__main__":
    cli.run(main)
