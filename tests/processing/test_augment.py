import colorsys
import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.processing import Augment, Preprocess, augment
from clip_jax.processing.images import decode, open_header, open_image


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


def scene(width: int, height: int) -> Image.Image:
    """Bright discs and slow waves on a dark ground, with noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / height
    pixels = 90 + 60 * np.stack([np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))], -1)
    for _ in range(40):
        disc = (x - rng.uniform(0, width / height)) ** 2 + (y - rng.uniform()) ** 2 < rng.uniform(0.02, 0.1) ** 2
        pixels[disc] = rng.uniform(0, 255, 3)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def decibels(pixels: np.ndarray, expected: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((pixels.astype(float) - expected) ** 2))


def uniform(values: list[float], low: float, high: float) -> bool:
    """Kolmogorov and Smirnov's test at 1%."""
    steps = np.arange(len(values) + 1) / len(values)
    ranks = (np.sort(values) - low) / (high - low)
    return max(abs(ranks - steps[1:]).max(), abs(ranks - steps[:-1]).max()) < 1.63 / len(values) ** 0.5


# The random square


@pytest.mark.parametrize("size", [(24, 12), (12, 24)])
def test_random_square_reaches_every_place_evenly(size):
    image = noise(*size)
    whole = np.asarray(image.resize(tuple(side // 2 for side in size), Image.Resampling.BICUBIC))
    places = [whole[6 - top : 12 - top] if size[1] > size[0] else whole[:, 6 - top : 12 - top] for top in range(7)]
    rng = np.random.default_rng(0)
    counts = np.zeros(7)
    for _ in range(700):
        square = Augment()(image, rng, Preprocess(6))
        counts += [np.abs(square.astype(int) - place).max() <= 1 for place in places]
    assert counts.sum() == 700
    assert counts.min() > 60


def test_random_square_is_frozen():
    """Runs that were begun earlier go on with the crops that they would have had, whatever else can be drawn."""
    image, rng, plain = noise(90, 30), np.random.default_rng(7), np.random.default_rng(7)
    whole = np.asarray(image.resize((30, 10), Image.Resampling.BICUBIC))
    for _ in range(5):
        left, top = plain.integers(21), plain.integers(1)
        square = Augment()(image, rng, Preprocess(10))
        np.testing.assert_array_equal(square, whole[top : top + 10, left : left + 10])
    assert rng.bit_generator.state == plain.bit_generator.state


def test_a_square_has_one_random_square():
    image = noise(33, 33).convert("P")
    square = Augment()(image, np.random.default_rng(0), Preprocess(10))
    np.testing.assert_array_equal(square, Preprocess(10).resize_and_crop(image))


# The resized crop


def box_of(square: np.ndarray) -> tuple[float, float, float, float]:
    """Where a crop of `ramp` lay, from its interior (bicubic's edges repeat): left, top, width, height."""
    side = len(square)
    across, down = square[side // 2, :, 0].astype(float), square[:, side // 2, 1].astype(float)
    sizes = [(line[-6] - line[5]) * side / (side - 11) for line in (across, down)]
    starts = [line[5] - 5.5 * size / side + 0.5 for line, size in zip((across, down), sizes, strict=True)]
    return *starts, *sizes


def ramp(width: int, height: int) -> Image.Image:
    """Red is x, green is y."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, x * 0], -1))


def test_resized_crops_have_the_areas_shapes_and_places_that_torchvision_documents():
    rng = np.random.default_rng(0)
    vary = Augment(crop="resized", scale=(0.2, 0.4), ratio=(0.6, 1.5))  # all of these fit
    boxes = [box_of(vary(ramp(250, 200), rng, Preprocess(64))) for _ in range(500)]
    assert uniform([width * height / (250 * 200) for *_, width, height in boxes], 0.2, 0.4)
    assert uniform([math.log(width / height) for *_, width, height in boxes], math.log(0.6), math.log(1.5))
    assert uniform([left / (250 - width) for left, _, width, _ in boxes], 0, 1)
    assert uniform([top / (200 - height) for _, top, _, height in boxes], 0, 1)


def test_crops_that_do_not_fit_are_drawn_again():
    """Of a wide image no crop of 90% is a square, but some have its shape."""
    rng = np.random.default_rng(0)
    vary = Augment(crop="resized", scale=(0.9, 1.0), ratio=(0.5, 2.0))
    boxes = [box_of(vary(ramp(240, 150), rng, Preprocess(64))) for _ in range(100)]
    ratios = [width / height for *_, width, height in boxes]
    assert 1.35 < min(ratios) < 1.5 < 1.7 < max(ratios) < 1.85


@pytest.mark.parametrize(
    ("size", "box"), [((400, 20), (186, 0, 213, 20)), ((20, 400), (0, 186, 20, 213)), ((7, 1), (3, 0, 4, 1))]
)
def test_too_elongated_images_give_the_largest_central_crop(size, box):
    image = noise(*size)
    square = Augment(crop="resized")(image, np.random.default_rng(0), Preprocess(16))
    expected = image.crop(box).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(square, np.asarray(expected))


def test_the_whole_image_as_the_model_resizes():
    image = noise(60, 40)
    vary = Augment(crop="resized", scale=(1.0, 1.0), ratio=(1.5, 1.5))
    square = vary(image, np.random.default_rng(0), Preprocess(16, interpolation="bilinear", resize_to=40))
    np.testing.assert_array_equal(square, np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("crop", augment.CROPS)
@pytest.mark.parametrize("size", [(1999, 129), (129, 1999), (1, 1), (3, 999)])
def test_nothing_is_ever_padded(crop, size):
    rng = np.random.default_rng(0)
    vary = Augment(crop=crop, scale=(0.05, 1.0), ratio=(0.2, 5.0))
    white = Image.new("RGB", size, "white")
    for source in (white, saved(white, "JPEG")):
        for _ in range(30):
            assert vary(source, rng, Preprocess(8)).min() == 255


# Mirrors and colours


def test_half_of_the_images_are_mirrored():
    image, mirrored = noise(20, 10), 0
    for seed in range(200):
        plain, other = (
            vary(image, np.random.default_rng(seed), Preprocess(10)) for vary in (Augment(), Augment(flip=True))
        )
        assert np.array_equal(other, plain) or np.array_equal(other, plain[:, ::-1])
        mirrored += np.array_equal(other, plain[:, ::-1])
    assert 80 < mirrored < 120


def jittered(strengths: tuple[float, float, float, float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of a scene as floats, before and after."""
    image = scene(48, 48)
    square = Augment(color_jitter=strengths)(image, np.random.default_rng(seed), Preprocess(48))
    return np.asarray(image).astype(float), square.astype(float)


def grey(pixels: np.ndarray) -> np.ndarray:
    """Luma as in ITU-R 601."""
    return pixels @ np.array([0.299, 0.587, 0.114])


def origin(pixels: np.ndarray, number: int) -> np.ndarray | float:
    """What an adjustment moves pixels away from: black, the mean grey, each pixel's own grey."""
    return (0.0, np.rint(grey(pixels).mean()), grey(pixels)[..., None])[number]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_brightness_contrast_and_saturation_scale_the_distance_from_black_and_grey(number):
    factors = []
    for seed in range(60):
        before, after = jittered(tuple(0.4 * (number == i) for i in range(4)), seed)
        centre = origin(before, number)
        inside = (after > 0) & (after < 255)
        offset = (before - centre)[inside]
        factor = offset @ (after - centre)[inside] / (offset @ offset)
        np.testing.assert_allclose(after, np.clip(centre + factor * (before - centre), 0, 255), atol=1.6)
        factors.append(factor)
    assert uniform(factors, 0.6, 1.4)


def test_strengths_beyond_one_leave_no_negative_factors():
    dark = [jittered((3.0, 0.0, 0.0, 0.0), seed)[1].mean() < 1 for seed in range(40)]
    assert sum(dark) < 4  # a third, if factors reached from -2 to 4
    for seed in range(40):
        before, after = jittered((0.0, 3.0, 0.0, 0.0), seed)
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0


def test_hue_turns_and_nothing_else_changes():
    shifts = []
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.8, 0.9) for hue in np.arange(16) / 16])
    image = Image.fromarray(np.rint(255 * colours).astype(np.uint8).reshape(4, 4, 3))
    vary = Augment(color_jitter=(0.0, 0.0, 0.0, 0.25))
    for seed in range(60):
        after = vary(image, np.random.default_rng(seed), Preprocess(4)).reshape(16, 3) / 255
        hues, saturations, values = np.transpose([colorsys.rgb_to_hsv(*colour) for colour in after])
        turns = (hues - np.arange(16) / 16 + 0.5) % 1 - 0.5
        np.testing.assert_allclose(turns, turns.mean(), atol=0.02)
        np.testing.assert_allclose(saturations, 0.8, atol=0.02)
        np.testing.assert_allclose(values, 0.9, atol=0.02)
        shifts.append(turns.mean())
    assert uniform(shifts, -0.25, 0.25)


def test_adjustments_come_in_any_order_with_the_factors_of_their_own(monkeypatch):
    calls = []
    spies = [lambda image, factor, i=i: calls.append((i, factor)) or image for i in range(4)]
    monkeypatch.setattr(augment, "_ADJUSTMENTS", spies)
    vary, rng = Augment(color_jitter=(0.1, 0.2, 0.3, 0.4)), np.random.default_rng(0)
    for _ in range(300):
        vary(noise(4, 4), rng, Preprocess(4))
    orders = {tuple(number for number, _ in calls[i : i + 4]) for i in range(0, len(calls), 4)}
    assert orders == set(itertools.permutations(range(4)))
    for number, (low, high) in enumerate([(0.9, 1.1), (0.8, 1.2), (0.7, 1.3), (-0.4, 0.4)]):
        assert uniform([factor for which, factor in calls if which == number], low, high)


def test_strength_zero_changes_nothing():
    before, after = jittered((0.0, 0.0, 0.0, 0.0), 0)
    np.testing.assert_array_equal(after, before)
    # Of the others one is on, and hue, whose way through HSV loses something, stays off.
    before, after = jittered((1e-9, 0.0, 0.0, 0.0), 0)
    np.testing.assert_allclose(after, before, atol=1)


# Decoding


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
@pytest.mark.parametrize(
    ("resized_to", "size"),
    [(224, (513, 385)), (256, (513, 385)), (257, (1025, 769)), (120, (257, 193)), (9, (129, 97))],
)
def test_large_jpegs_are_decoded_at_a_scale_that_leaves_half_as_many_again(kind, resized_to, size):
    content = saved(Image.new("RGB", (1025, 769), "teal"), kind)
    assert decode(open_header(content), resized_to).size == size
    assert decode(open_header(content)).size == open_image(content).size == (1025, 769)


@pytest.mark.parametrize("crop", ["random", "resized"])
def test_reduced_decoding_changes_little_and_no_draw(crop):
    jpeg = saved(scene(803, 602), "JPEG", quality=90)
    exact = saved(open_image(jpeg), "PNG")
    vary = Augment(crop=crop, scale=(0.6, 1.0))
    for seed in range(3):
        reduced, full = (vary(source, np.random.default_rng(seed), Preprocess(96)) for source in (jpeg, exact))
        assert not np.array_equal(reduced, full)
        assert decibels(reduced, full) > 33


def test_a_center_crop_is_what_the_model_sees_at_inference():
    jpeg, preprocess, rng = saved(scene(803, 602), "JPEG"), Preprocess(96), np.random.default_rng(0)
    vary = Augment(crop="center")
    np.testing.assert_array_equal(vary(jpeg, rng, preprocess), preprocess.resize_and_crop(open_image(jpeg)))
    assert rng.random() == np.random.default_rng(0).random()
    assert (
        not vary.is_random
        and Augment().is_random
        and Augment(crop="center", color_jitter=(0.0, 0.0, 0.0, 0.1)).is_random
    )


def test_a_small_crop_is_decoded_in_full():
    jpeg = saved(scene(803, 602), "JPEG", quality=90)
    vary = Augment(crop="resized", scale=(0.02, 0.02))
    found, expected = (vary(s, np.random.default_rng(0), Preprocess(96)) for s in (jpeg, open_image(jpeg)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("load", [True, False])
def test_an_image_is_used_as_it_is_and_left_so(load):
    image = Image.open(io.BytesIO(saved(scene(803, 602), "JPEG")))
    if load:
        image.load()
    assert open_image(image) is image
    for crop in augment.CROPS:
        Augment(crop=crop)(image, np.random.default_rng(0), Preprocess(32))
    assert image.size == (803, 602)


# Mistakes


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1), (0, 5)])
def test_image_that_would_explode_or_is_empty_is_refused(size):
    with pytest.raises(UserError, match=r"elongated|with pixels"):
        Augment()(Image.new("L", size), np.random.default_rng(0), Preprocess(224))


def test_resized_crop_of_nothing_is_refused():
    with pytest.raises(UserError, match="with pixels, got one of 5 x 0"):
        Augment(crop="resized")(Image.new("L", (5, 0)), np.random.default_rng(0), Preprocess(8))


def test_truncated_file_is_refused_by_name(tmp_path):
    path = tmp_path / "half.jpg"
    content = saved(scene(64, 64), "JPEG")
    path.write_bytes(content[: len(content) // 2])
    for crop in augment.CROPS:
        with pytest.raises(UserError, match=r"half\.jpg: expected a readable image"):
            Augment(crop=crop)(path, np.random.default_rng(0), Preprocess(8))
        with pytest.raises(UserError, match=r"^image bytes: expected a readable image"):
            Augment(crop=crop)(path.read_bytes(), np.random.default_rng(0), Preprocess(8))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("crop", "centre"),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 1.1)),
        ("scale", (0.9, 0.8)),
        ("scale", (math.nan, 1.0)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("ratio", (1.0, math.inf)),
        ("color_jitter", (-0.1, 0.0, 0.0, 0.0)),
        ("color_jitter", (0.0, math.inf, 0.0, 0.0)),
        ("color_jitter", (0.0, 0.0, 0.0, 0.6)),
        ("color_jitter", (0.0, 0.0, 0.0, math.nan)),
    ],
)
def test_impossible_options_are_refused(option, value):
    with pytest.raises(UserError, match=rf"augment\.{option} must be .*got"):
        Augment(**{option: value})


def test_a_reduced_scale_is_that_of_each_side():
    """Decoded at 1/8, 17 pixels become 3 and 800 become 100: a crop by the scale of one side would have edges."""
    white = saved(Image.new("RGB", (17, 800), "white"), "JPEG")
    whole = Augment(crop="resized", scale=(1.0, 1.0), ratio=(17 / 800, 17 / 800))
    assert (whole(white, np.random.default_rng(0), Preprocess(1)) == 255).all()
