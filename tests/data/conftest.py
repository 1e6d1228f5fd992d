"""One rendering of a small `shapes` data set for all tests of this folder."""

import pytest

from clip_jax.data import shapes


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("tfds"))
    with pytest.MonkeyPatch.context() as patch:
        few = {split: (labels, 4) for split, (labels, _) in shapes.SPLITS.items()}
        patch.setattr(shapes, "SPLITS", few)
        shapes.prepared_builder(directory)
    return directory
