"""Which files a finished checkpoint consists of: none is lost, cut, swapped or altered without a word.

The digests of arrays (clip_jax/digests.py) say that what comes back is what was on the devices; this says which file
is damaged where it is not, and covers the files that no array depends on.

  STEP/files.json   {"version": 1, "files": {path: [bytes, CRC-32C]}, "sha256": of all that}

It is the last file to be written before Orbax commits the checkpoint. Orbax then puts the time into a file of notes and
adds another one; nothing depends on what is in these two, so they are not listed.
"""

import json
from collections.abc import Iterator

import google_crc32c
from etils import epath

from clip_jax.errors import DamagedFile
from clip_jax.sealed_json import check_seal, read_object, sealed
from clip_jax.workdir import write_whole

MANIFEST = "files.json"
NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")
_VERSION = 1
_CHUNK = 2**24  # bytes that are read at a time


def write_manifest(folder: epath.Path) -> None:
    """List the files of a checkpoint that is complete."""
    files = {name: _fingerprint(folder / name) for name in sorted(file_names(folder)) if name not in NOTES}
    write_whole(folder / MANIFEST, json.dumps(sealed({"version": _VERSION, "files": files})))


def check_manifest(folder: epath.Path, share: int = 0, shares: int = 1) -> None:
    """Compare the files of a checkpoint with its list.

    Args:
      folder: of the checkpoint.
      share: which part of the files to read, where several processes share them.
      shares: how many parts there are.

    Raises:
      DamagedFile: a file or the list is missing, or not what was written; the message names it.
    """
    read_object(folder / NOTES[0])
    listed = read_object(folder / MANIFEST)
    check_seal(listed, folder / MANIFEST)
    for name, fingerprint in list(listed["files"].items())[share::shares]:
        try:
            found = _fingerprint(folder / name)
        except FileNotFoundError as error:
            raise DamagedFile(f"{folder / name} is missing") from error
        if found != fingerprint:
            raise DamagedFile(f"{folder / name} is damaged: its size or checksum is not what was written")


def file_names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The paths of all files in a folder and the folders in it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from file_names(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _fingerprint(file: epath.Path) -> list[int]:
    size, checksum = 0, google_crc32c.Checksum()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            size += len(chunk)
            checksum.update(chunk)
    return [size, int.from_bytes(checksum.digest(), "big")]
