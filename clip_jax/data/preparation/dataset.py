"""The finished shards as a data set of TFDS."""

import os
from collections.abc import Sequence

import tensorflow_datasets as tfds  # brings no TensorFlow along as long as only array records are written

from clip_jax.data.preparation.destination import VERSION, Destination
from clip_jax.data.preparation.features import make_features
from clip_jax.data.preparation.job import Job
from clip_jax.data.preparation.ranges import ShardStage, Summary, total


def assemble(job: Job, destination: Destination, summaries: Sequence[Summary], folder: str) -> None:
    """Give the shards that hold samples their names in the data set, and write TFDS's files beside them.

    Args:
      job: whose shards are all done.
      destination: has the names.
      summaries: of the shards.
      folder: where they go.
    """
    kept = [number for number, summary in enumerate(summaries) if summary.kept]
    for place, number in enumerate(kept):
        name = f"{destination.name}-{destination.split}.array_record-{place:05}-of-{len(kept):05}"
        os.replace(job.path(ShardStage.name, number, "array_record"), os.path.join(folder, name))
    everything = total(summaries)
    split = tfds.core.SplitInfo(
        name=destination.split,
        shard_lengths=[summaries[number].kept for number in kept],
        num_bytes=everything.bytes,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=make_features(job.shape, everything.classes),
        split_infos=[split],
        version=VERSION,
        description=_description(job, everything),
        check_data=False,
    )


def _description(job: Job, everything: Summary) -> str:
    """What people read about the data set."""
    lines = [
        f"{everything.kept} of the {job.shape.samples} samples of a source, prepared by clip_jax.",
        "",
        "Source and options:",
        *(f"- {name}: {value!r}" for name, value in job.identity.items()),
    ]
    if everything.left_out:
        lines += ["", "Left out:", *(f"- {reason}: {count}" for reason, count in everything.left_out.items())]
    return "\n".join(lines)
