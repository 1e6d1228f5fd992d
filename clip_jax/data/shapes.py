"""`shapes`: scenes of one coloured shape with varied captions, rendered here and kept as a TFDS data set.

Eight of the 64 colour–shape pairs never occur in training, neither in an image nor in a caption, yet each
colour and each shape does with the seven others. So the pairs held out measure whether a model composes what
it knows. Every scene is a pure function of (seed, index).
"""

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds  # brings no TensorFlow along as long as only array records are used
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from clip_jax.data.order import sample_generator
from clip_jax.data.tfds_builder import prepare
from clip_jax.errors import UserError

RESOLUTION = 32
_SUPERSAMPLING = 4

COLOURS = {
    "red": (240, 40, 45),
    "orange": (255, 145, 20),
    "yellow": (250, 230, 60),
    "green": (50, 205, 80),
    "cyan": (60, 220, 235),
    "blue": (70, 110, 255),
    "purple": (175, 80, 225),
    "pink": (255, 165, 210),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "crescent")
PAIRS = tuple(itertools.product(COLOURS, SHAPES))


def with_article(thing: str) -> str:
    """ "an orange circle"."""
    return ("an " if thing[0] in "aeiou" else "a ") + thing


CLASS_NAMES = tuple(with_article(f"{colour} {shape}") for colour, shape in PAIRS)
# A diagonal of the colour × shape table: each colour and each shape misses exactly one partner in training.
HELD_OUT = tuple(8 * colour + (3 * colour + 2) % 8 for colour in range(8))
SEEN = tuple(label for label in range(64) if label not in HELD_OUT)

# Each split is (its pairs, images per pair), rendered from a seed of its own; that of `held_out` was first used after
# the scenes and the demo had been designed.
SPLITS = {"train": (SEEN, 300), "validation": (SEEN, 20), "held_out": (HELD_OUT, 120)}
_SEEDS = {"train": 0, "validation": 1, "held_out": 20_261_121}

_SIZES = {"small": (0.48, 0.54), "medium": (0.62, 0.68), "large": (0.76, 0.82)}  # diameter / image side
# All grounds are darker than all colours: an outline then looks alike whatever it lies on.
_BACKGROUNDS = {"black": 15, "charcoal": 45, "gray": 75}
_COLUMNS = ("left", "middle", "right")
_ROWS = ("top", "middle", "bottom")

_SYNONYMS = {
    "circle": ("circle", "disc"), "cross": ("cross", "plus sign"), "ring": ("ring", "hoop"),
    "crescent": ("crescent", "crescent moon"), "red": ("red", "crimson"), "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"), "small": ("small", "little", "tiny"), "large": ("large", "big", "huge"),
    "gray": ("gray", "grey"), "middle": ("middle", "centre"),
}  # fmt: skip
_FRAMES = (
    "{}", "{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "this is {}",
    "there is {}", "here is {}", "we see {}", "the picture shows {}", "look at {}",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows: the pair's number, and the attributes that its captions may mention."""

    label: int
    size: str
    column: str
    row: str
    background: str


def outline(shape: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A shape as polygons of float (points, 2), within about the unit circle, y downwards.

    Returns:
      the outer polygon, and the hole within it or None.
    """
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    circle = np.stack([np.sin(turn), -np.cos(turn)], axis=1)
    match shape:
        case "circle":
            return circle, None
        case "square":
            return 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), None
        case "triangle":
            return 1.1 * circle[[0, 21, 43]] + np.array((0, 0.2)), None
        case "star":
            radius = np.where(np.arange(10) % 2 == 0, 1.12, 0.42)
            angle = np.arange(10) * np.pi / 5
            return radius[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1), None
        case "cross":
            arm = [(-0.28, -1), (0.28, -1), (0.28, -0.28)]
            quarter = np.array([[0, -1], [1, 0]])
            turns = [np.linalg.matrix_power(quarter, k) for k in range(4)]
            return np.concatenate([np.array(arm) @ turned.T for turned in turns]), None
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return np.stack([x, -y - 2], axis=1) / 15.5, None
        case "ring":
            return circle, 0.52 * circle
        case "crescent":
            return circle + np.array((0.15, 0)), 0.85 * circle + np.array((0.7, 0))
    raise ValueError(f"no such shape: {shape}")


def sample_scene(label: int, generator: np.random.Generator) -> Scene:
    """Draw the attributes of a scene that shows pair `label`."""
    options = (_SIZES, _COLUMNS, _ROWS, _BACKGROUNDS)
    return Scene(label, *(_pick(tuple(names), generator) for names in options))


def render(scene: Scene, generator: np.random.Generator) -> UInt8[np.ndarray, "32 32 3"]:
    """Paint a scene: a tinted, graded, noisy ground and the shape, antialiased and turned a little."""
    uniform = generator.uniform
    colour, shape = PAIRS[scene.label]
    diameter = uniform(*_SIZES[scene.size])
    room = (1 - diameter) / 2
    centre = [
        0.5 + room * (choices.index(place) - 1) * uniform(0.6, 0.9) + room * uniform(-0.1, 0.1)
        for place, choices in ((scene.column, _COLUMNS), (scene.row, _ROWS))
    ]
    angle = uniform(-0.12, 0.12)
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mask = Image.new("L", (RESOLUTION * _SUPERSAMPLING,) * 2)
    for polygon, fill in zip(outline(shape), (255, 0), strict=True):
        if polygon is not None:
            corners = (centre + polygon @ turned.T * diameter / 2) * RESOLUTION * _SUPERSAMPLING
            ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=fill)
    cover = np.asarray(mask.reduce(_SUPERSAMPLING), np.float32)[:, :, None] / 255

    ground = _BACKGROUNDS[scene.background] + uniform(-15, 15) + uniform(-6, 6, 3)
    ramp = np.linspace(-1, 1, RESOLUTION)
    ground = ground + (ramp[:, None] * uniform(-12, 12) + ramp * uniform(-12, 12))[:, :, None]
    paint = np.array(COLOURS[colour]) * uniform(0.9, 1.05) + uniform(-8, 8, 3)
    pixels = ground * (1 - cover) + paint * cover
    pixels += generator.normal(0, uniform(1, 5), pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def captions(scene: Scene, generator: np.random.Generator) -> tuple[str, ...]:
    """Six captions of a scene, in varied frames and words: three name colour and shape, three the shape alone.

    Some mention the size, the place or the ground. The captions without a colour show a model what a shape is
    whatever its colour, which is harder to learn than colours are.
    """
    colour, shape = PAIRS[scene.label]
    things = [(colour, shape)] * 3 + [("", shape)] * 3
    return tuple(_caption(scene, *thing, generator) for thing in things)


def _caption(scene: Scene, colour: str, shape: str, generator: np.random.Generator) -> str:
    """One sentence on a scene that calls its object by these words and their synonyms."""

    def word(name: str) -> str:
        return name if generator.random() < 0.7 else _pick(_SYNONYMS.get(name, (name,)), generator)

    size = word(scene.size) if scene.size != "medium" and generator.random() < 0.2 else ""
    thing = " ".join(filter(None, (size, word(colour), word(shape))))
    sentence = _pick(_FRAMES, generator).format(with_article(thing))
    if generator.random() < 0.2:
        sentence += f" {_place(scene, word)}"
    if generator.random() < 0.1:
        sentence += f" on a {word(scene.background)} background"
    return sentence + _pick(("", "."), generator)


def _place(scene: Scene, word: Callable[[str], str]) -> str:
    """Where the object is, such as "at the top" or "in the bottom left corner"."""
    if scene.row == "middle":
        return f"in the {word('middle')}" if scene.column == "middle" else f"on the {scene.column}"
    return f"at the {scene.row}" if scene.column == "middle" else f"in the {scene.row} {scene.column} corner"


def _pick(options: tuple[str, ...], generator: np.random.Generator) -> str:
    return options[generator.integers(len(options))]


class Shapes(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder: splits `train` and `validation` of the pairs seen in training, and `held_out`."""

    VERSION = tfds.core.Version("1.3.1")  # to be raised with any change of pixels, captions or class names
    url_infos = None  # nothing is downloaded, so there are no checksums to look for

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(RESOLUTION, RESOLUTION, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Scenes of one coloured shape with captions, rendered by clip_jax.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, _dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(_SEEDS[split], *SPLITS[split]) for split in SPLITS}

    def _generate_examples(self, seed: int, labels: tuple[int, ...], images_per_label: int) -> Iterator:
        for index in range(len(labels) * images_per_label):
            generator = sample_generator(seed, index)
            scene = sample_scene(labels[index % len(labels)], generator)
            png = io.BytesIO()
            Image.fromarray(render(scene, generator)).save(png, "PNG", compress_level=1)
            png.seek(0)
            yield index, {"image": png, "captions": captions(scene, generator), "label": scene.label}


def prepared_builder(data_dir: str) -> Shapes:
    """The builder with its data on disk, rendered on first use (seconds).

    Args:
      data_dir: where TFDS keeps its data sets; "" is TFDS's own default, which `TFDS_DATA_DIR` sets.

    Raises:
      UserError: the directory cannot be written.
    """
    builder = Shapes(data_dir=data_dir or None, file_format="array_record")
    if builder.data_path.exists():
        return builder
    print(f"Rendering the shapes data set into {builder.data_dir}", flush=True)
    tfds.disable_progress_bar()
    try:
        prepare(builder)
    except UserError as error:
        raise UserError(f"{error}; set data_dir") from error
    return Shapes(data_dir=data_dir or None)  # another process may have been quicker
