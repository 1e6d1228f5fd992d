"""One of two processes that evaluate: `python -m tests.multiprocess.evaluation_worker COORDINATOR INDEX FOLDER`."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import evaluate
from clip_jax.errors import UserError
from clip_jax.evaluation.classify import classify
from clip_jax.evaluation.features import extract
from clip_jax.evaluation.zero_shot import zero_shot
from tests.evaluation import pods


def main(coordinator: str, index: int, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    said = {"code": evaluate.main(arguments(coordinator, index, folder))}
    own = pods.encoders(jax.devices())
    found, said["read"] = pods.evaluated(own)
    np.savez(folder / f"{index}.npz", **found)
    again = pods.dataset().source
    with pods.few_fits():
        extract(own, pods.variables(), again, progress=False)
    said["read again"] = again.read
    said["one"] = zero_shot(own, pods.variables(), pods.dataset(1), progress=False).scores.tolist()
    images = sorted(map(str, (folder / "good").glob("*/*.png")))
    said["probabilities"] = classify(own, pods.variables(), images, pods.CLASSES, False).probabilities.tolist()
    said["broken"] = refusal(lambda: zero_shot(own, pods.variables(), pods.dataset(broken=90), progress=False))
    said["sizes"] = refusal(lambda: zero_shot(own, pods.variables(), pods.dataset(10 + index), progress=False))
    said["missing"] = refusal(lambda: classify(own, pods.variables(), [*images, "nowhere.png"], pods.CLASSES, False))
    (folder / f"{index}.json").write_text(json.dumps(said))


def arguments(coordinator, index, folder):
    """Of evaluate.py, on a whole data set and one with a damaged image."""
    return [
        *("--weights", str(folder / "model"), "--datasets", f"{folder / 'good'},{folder / 'damaged'}"),
        *("--output", str(folder / "results.json"), "--report", str(folder / "new" / "report.html")),
        *("--coordinator", coordinator, "--processes", "2", "--process_index", str(index)),
    ]


def refusal(action):
    try:
        action()
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
