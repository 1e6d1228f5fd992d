import dataclasses
import io
import struct
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.models.config import INTERPOLATIONS
from clip_jax.processing.images import FORMATS, MAX_PIXELS, Preprocess, open_image
from tests import tiny


def torchvision_pixels(image: Image.Image, n: int) -> Image.Image:
    """Resize(n, BICUBIC), CenterCrop(n), convert("RGB") as torchvision documents them."""
    w, h = image.size
    new_w, new_h = (n, int(n * h / w)) if w <= h else (int(n * w / h), n)
    image = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    top, left = round((new_h - n) / 2.0), round((new_w - n) / 2.0)
    image = image.crop((left, top, left + n, top + n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow: the transparency of a palette gets lost
        return image.convert("RGB")


def torchvision_tensor(pixels: np.ndarray) -> np.ndarray:
    """ToTensor and Normalize with OpenAI's constants, in torch; (height, width, 3) in and out."""
    mean = torch.as_tensor((0.48145466, 0.4578275, 0.40821073), dtype=torch.float32)[:, None, None]
    std = torch.as_tensor((0.26862954, 0.26130258, 0.27577711), dtype=torch.float32)[:, None, None]
    tensor = torch.tensor(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return tensor.sub_(mean).div_(std).permute(1, 2, 0).numpy()


def noise(width: int, height: int, channels: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, channels), np.uint8)


def image_of(mode: str, width: int, height: int) -> Image.Image:
    if mode in ("1", "P"):
        image = Image.fromarray(noise(width, height, 3)).convert(mode)
    elif mode == "I;16":
        image = Image.fromarray(noise(width, height, 2).view(np.uint16)[..., 0])
    else:
        bands = noise(width, height, len(Image.new(mode, (1, 1)).getbands()))
        image = Image.merge(mode, [Image.fromarray(band) for band in bands.transpose(2, 0, 1)])
    assert image.mode == mode
    return image


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def assert_equals_torchvision(image: Image.Image, resolution: int) -> None:
    preprocess = Preprocess(resolution)
    expected = np.asarray(torchvision_pixels(image, resolution))
    pixels = preprocess.resize_and_crop(image)
    assert pixels.shape == (resolution, resolution, 3)
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(preprocess(image), torchvision_tensor(expected))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16"])
@pytest.mark.parametrize("size", [(301, 200), (97, 140)])
def test_modes_equal_torchvision(mode, size):
    assert_equals_torchvision(image_of(mode, *size), 112)


# 8-pixel crops whose surplus is 1, 2, 3, 5 and 7: halves are rounded to even.
@pytest.mark.parametrize("side", [9, 10, 11, 13, 15])
def test_halves_round_as_in_torchvision(side):
    assert_equals_torchvision(image_of("RGB", side, 8), 8)
    assert_equals_torchvision(image_of("RGB", 8, side), 8)


@pytest.mark.parametrize(
    "size", [(224, 224), (500, 333), (333, 500), (3000, 20), (20, 3000), (1, 1), (1, 60), (60, 1), (225, 226)]
)
def test_sizes_equal_torchvision(size):
    assert_equals_torchvision(image_of("RGB", *size), 224)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparent_palette_equals_torchvision_without_a_warning(transparency):
    image = open_image(saved(image_of("P", 50, 40), "PNG", transparency=transparency))
    assert image.mode == "P"
    assert type(image.info["transparency"]) is type(transparency)
    info = image.info.copy()
    assert_equals_torchvision(image, 32)
    assert image.info == info, "the caller's image is left as it was"


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "rotated.jpg"
    path.write_bytes(saved(image_of("RGB", 60, 40), "JPEG", exif=exif))
    image = open_image(path)
    assert image.getexif()[0x0112] == 6
    assert image.size == (60, 40)
    with Image.open(path) as plain:
        np.testing.assert_array_equal(
            Preprocess(32).resize_and_crop(image),
            np.asarray(torchvision_pixels(plain, 32)),
        )


def test_normalize_equals_torchvision_on_every_value_for_any_rank_and_under_jit():
    images = np.repeat(np.arange(256, dtype=np.uint8).reshape(2, 16, 8, 1), 3, axis=-1)
    expected = np.stack([torchvision_tensor(image) for image in images])
    normalize = Preprocess(8).normalize
    assert isinstance(normalize(images), np.ndarray)
    np.testing.assert_array_equal(normalize(images), expected)
    np.testing.assert_array_equal(normalize(images[0, 0, 0]), expected[0, 0, 0])
    for on_device in (normalize(jnp.asarray(images)), jax.jit(normalize)(images)):
        assert on_device.dtype == np.float32
        np.testing.assert_allclose(on_device, expected, rtol=0, atol=1e-6)


def test_own_mean_and_std():
    preprocess = Preprocess(4, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    white = preprocess(Image.new("RGB", (9, 5), "white"))
    np.testing.assert_array_equal(white, np.broadcast_to(np.float32([1.0, 0.75, 0.5]), (4, 4, 3)))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("resize", "resize_to"), [("shortest", 0), ("shortest", 48), ("squash", 0), ("squash", 48)])
def test_other_ways_to_resize(interpolation, resize, resize_to):
    """Against torchvision's arithmetic, written out for one wide image: Resize(48) or Resize((48, 48)), CenterCrop."""
    image = image_of("RGB", 200, 99)
    side = resize_to or 32
    size = (side, side) if resize == "squash" else (side * 200 // 99, side)
    resized = np.asarray(image.resize(size, getattr(Image.Resampling, interpolation.upper())))
    left, top = round((size[0] - 32) / 2), round((side - 32) / 2)
    preprocess = Preprocess(32, interpolation=interpolation, resize=resize, resize_to=resize_to)
    np.testing.assert_array_equal(preprocess.resize_and_crop(image), resized[top : top + 32, left : left + 32])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squashed_pixels_equal_antialiased_interpolation(interpolation):
    """torch's own filters, which share no code with Pillow, up to the rounding to whole numbers after each axis."""
    pixels = noise(61, 47, 3)
    found = Preprocess(24, interpolation=interpolation, resize="squash").resize_and_crop(Image.fromarray(pixels))
    expected = torch.nn.functional.interpolate(
        torch.tensor(pixels).permute(2, 0, 1)[None].double(), (24, 24), mode=interpolation, antialias=True
    )
    expected = expected[0].permute(1, 2, 0).clamp(0, 255).numpy()
    np.testing.assert_allclose(found.astype(float), expected, rtol=0, atol=1.5)


def test_from_config_takes_every_field_of_the_description():
    config = dataclasses.replace(
        tiny.VIT,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        image_interpolation="bilinear",
        image_resize="squash",
        image_resize_to=40,
    )
    expected = Preprocess(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash", 40)
    assert Preprocess.from_config(config) == expected
    assert Preprocess.from_config(tiny.VIT) == Preprocess(32)


def test_squashing_to_a_size_beyond_all_reason_is_refused():
    with pytest.raises(UserError, match="elongated"):
        Preprocess(32, resize="squash", resize_to=2**20).resize_and_crop(image_of("RGB", 5, 5))


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1), (0, 5)])
def test_image_that_would_explode_or_is_empty_is_refused(size):
    image = Image.new("L", size)
    with pytest.raises(UserError, match=r"elongated|with pixels"):
        Preprocess(224).resize_and_crop(image)


def test_mode_without_rgb_is_refused():
    with pytest.raises(UserError, match="got mode La"):
        Preprocess(4).resize_and_crop(Image.new("La", (5, 5)))


@pytest.mark.parametrize("file_format", FORMATS)
def test_allowed_formats_open_from_path_and_bytes(file_format, tmp_path):
    content = saved(image_of("RGB", 40, 30), file_format)
    path = tmp_path / "image"
    path.write_bytes(content)
    expected = np.asarray(torchvision_pixels(Image.open(io.BytesIO(content)), 16))
    for source in (path, str(path), content):
        np.testing.assert_array_equal(Preprocess(16).resize_and_crop(open_image(source)), expected)


@pytest.mark.parametrize("file_format", ["GIF", "TIFF", "WEBP", "MPO"])
def test_first_frame_of_several(file_format):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    image = open_image(saved(frames[0], file_format, save_all=True, append_images=frames[1:]))
    red, green, blue = Preprocess(4).resize_and_crop(image)[0, 0]
    assert red > 240 and green < 10 and blue < 10


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# At 90 million pixels Pillow warns, at 10 billion it raises; with its check switched off ours remains.
@pytest.mark.parametrize("size", [(10_000, 9_000), (100_000, 100_000)])
@pytest.mark.parametrize("pillow", ["error", "ignore", "off"])
def test_too_many_pixels_are_refused_from_the_header(size, pillow, monkeypatch, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    if pillow == "off":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if pillow == "ignore" else "error")
        with pytest.raises(UserError, match=rf"bomb\.png: expected an image of at most {MAX_PIXELS} pixels"):
            open_image(path)


def test_pillow_warns_of_no_image_that_we_accept():
    assert MAX_PIXELS <= Image.MAX_IMAGE_PIXELS


def bad_files() -> dict[str, bytes]:
    image = image_of("RGB", 64, 64)
    files = {f"truncated.{kind}": saved(image, kind)[: len(saved(image, kind)) // 2] for kind in FORMATS}
    corrupt = bytearray(saved(image, "PNG"))
    corrupt[60:90] = bytes(30)
    return files | {
        "empty.jpg": b"",
        "text.png": b"not an image",
        "corrupt.png": bytes(corrupt),
        "no_pixels.png": png_header(10, 10),
        "format_not_allowed.ico": saved(image, "ICO"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_file_is_refused_by_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(bad_files()[name])
    with pytest.raises(UserError, match=f"{name}: expected a readable image"):
        open_image(path)
    with pytest.raises(UserError, match=r"^image bytes: expected a readable image"):
        open_image(path.read_bytes())


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(UserError, match=f"{path.name}: expected a readable image"):
            open_image(path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_mutated_files_raise_nothing_but_user_errors(file_format):
    rng = np.random.default_rng(0)
    content = saved(image_of("RGB", 24, 24), file_format)
    refused = 0  # a PNG always, for its checksums; a BMP seldom
    for _ in range(150):
        mutated = np.frombuffer(content, np.uint8).copy()
        mutated[rng.integers(0, min(len(mutated), 400), 4)] = rng.integers(0, 256, 4)
        try:
            Preprocess(8)(open_image(mutated.tobytes()))
        except UserError:
            refused += 1
    assert refused
