"""The same samples in each format, written by other people's code, and raw tar headers for damage."""

import io
import json
import struct
import tarfile

import google_crc32c
import numpy as np
from PIL import Image


def photo(index, size=(40, 30)):
    """A JPEG that tells its number, like no other one."""
    pixels = np.random.default_rng(index).integers(0, 256, (*size[::-1], 3), np.uint8)
    pixels[:8, :8] = index % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def caption(index):
    return f"photo number {index}: naïve café"


def members(index):
    """What img2dataset writes of a sample."""
    return {
        "jpg": photo(index),
        "txt": caption(index).encode(),
        "json": json.dumps({"key": f"{index:08}", "alt": f"other words for {index}", "width": 40}).encode(),
    }


def add(archive, name, content, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    archive.addfile(info, io.BytesIO(content))


def write_tar(path, indices, mode="w", tar_format=tarfile.USTAR_FORMAT, content=members):
    with tarfile.open(path, mode, format=tar_format) as archive:
        for index in indices:
            for extension, data in content(index).items():
                add(archive, f"{index:08}.{extension}", data)


def masked_crc(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data):
    length = struct.pack("<Q", len(data))
    return length + masked_crc(length) + data + masked_crc(data)


def write_tfrecord(path, indices):
    """As TensorFlow writes it."""
    import tensorflow as tf

    def feature(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for index in indices:
            fields = {"key": feature(f"{index:08}".encode())} | {
                name: feature(value) for name, value in members(index).items()
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=fields)).SerializeToString())
