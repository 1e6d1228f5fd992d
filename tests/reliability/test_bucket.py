"""A workdir in a bucket, where nothing can be renamed at once: train, kill, refuse, go on, fall back, evaluate."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from clip_jax.training.lock import Lock
from tests.multiprocess.processes import ROOT
from tests.reliability.gcs import Gcs
from tests.reliability.harness import live

WORKDIR = "gs://bucket/run"


@pytest.fixture(scope="module")
def storage():
    """The emulator, which the processes that are started find through the environment."""
    from gcp_storage_emulator.server import create_server

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator._api.daemon = True
    emulator.start()
    server = Gcs(emulator._api._httpd.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "STORAGE_EMULATOR_HOST": server.url,
            "TENSORSTORE_GCS_HTTP_URL": server.url,
            "EPATH_USE_TF": "false",  # TensorFlow's client does not know of emulators
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GCE_METADATA_HOST": "127.0.0.1:1",  # nobody to ask for credentials
            "NO_GCE_CHECK": "true",
        }.items():
            patch.setenv(name, value)
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        yield server
    server.shutdown()
    server.server_close()
    thread.join()
    emulator.stop()


@pytest.mark.slow
def test_killed_continued_damaged_and_evaluated_in_a_bucket(storage, tmp_path):
    def life(**order):
        return live(WORKDIR, logs=str(tmp_path), config={"total_steps": 9}, **order)

    def names():
        _, _, content = storage.ask("GET", "/storage/v1/b/bucket/o")
        return [item["name"] for item in json.loads(content)["items"]]

    code, said = life(kill="all written", count=2)
    assert code == -signal.SIGKILL, said
    assert any(name.startswith("run/checkpoints/6/") for name in names())  # half of it is there, under its own name
    with closing(Lock(WORKDIR)):  # taken over from the dead one
        code, said = life()
    assert code == 2 and f"process {os.getpid()} on" in said, said
    code, said = life(kill="batch", count=2, signal="SIGTERM")
    assert code == 128 + signal.SIGTERM, said
    assert "resuming from step 3" in said
    code, said = life()
    assert code == 0, said
    assert "resuming from step 5" in said
    data = next(name for name in names() if name.startswith("run/checkpoints/9/opt_state/d/"))
    address = data.replace("/", "%2F")
    _, _, content = storage.ask("GET", f"/storage/v1/b/bucket/o/{address}?alt=media")
    flipped = bytes([content[0] ^ 1]) + content[1:]
    storage.ask("POST", f"/upload/storage/v1/b/bucket/o?uploadType=media&name={address}", flipped)
    code, said = life()
    assert code == 0, said
    assert f"gs://bucket/{data} is damaged" in said and "resuming from step 6" in said
    assert any(name.startswith("run/damaged/9/") for name in names())
    results = tmp_path / "results.json"
    command = ["evaluate.py", "--weights", WORKDIR, "--datasets", "digits", "--output", results]
    evaluated = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert evaluated.returncode == 0, evaluated.stderr
    (row,) = json.loads(results.read_text())
    assert row["pretrained"] == WORKDIR and 0 < row["metrics"]["acc1"] <= 1
