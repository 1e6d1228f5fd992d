"""What the examples run with: OpenAI's weights where they can be fetched, else a tiny CLIP that is trained here once.

The stand-in learns from 24 photographs that come with scikit-image, scikit-learn and matplotlib, by this project's own
training. It knows the photographs of the examples, though not their sentences, and nothing else of the world.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import skimage
import sklearn.datasets
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.options import from_dict
from clip_jax.platform import cache_folder, keep_compiled_programs, keep_libtpu_quiet
from clip_jax.weights.download import Patience, fetch
from clip_jax.workdir import steps_of

# What each photograph shows, in several ways.
THINGS = {
    "astronaut.png": ("an astronaut", "a woman in a space suit", "a smiling woman beside an American flag"),
    "brick.png": ("bricks", "a brick wall", "a pavement of gray bricks"),
    "camera.png": ("a man with a camera", "a man who looks through a camera", "a cameraman with a tripod on a lawn"),
    "cell.png": ("a cell", "a round cell under a microscope", "a bright cell on a dark ground"),
    "chelsea.png": ("a cat", "a tabby cat", "the face of a cat with green eyes"),
    "chessboard_GRAY.png": ("a chessboard", "black and white squares", "an empty chessboard from above"),
    "china.jpg": ("a temple", "a Chinese pagoda", "a tower with a red roof by a lake"),
    "coffee.png": ("a cup", "a cup of coffee", "a red cup with espresso on a saucer and a spoon"),
    "coins.png": ("coins", "old coins in rows", "a collection of Roman coins"),
    "color.png": ("a colour wheel", "all colours of the rainbow in a circle", "a wheel of bright colours on black"),
    "flower.jpg": ("a flower", "an orange flower", "a dahlia in a garden"),
    "grace_hopper.jpg": ("an officer", "an officer in a navy uniform", "an admiral with glasses and a white cap"),
    "grass.png": ("grass", "a lawn from above", "blades of grass"),
    "gravel.png": ("gravel", "small stones", "a path of gravel from above"),
    "horse.png": ("a horse", "the black shape of a horse", "the silhouette of a horse on white"),
    "hubble_deep_field.jpg": ("galaxies", "stars in the night sky", "many distant galaxies on a black sky"),
    "ihc.png": ("tissue", "stained tissue under a microscope", "a brown and blue slice of tissue"),
    "moon.png": ("the moon", "craters on the moon", "the gray surface of the moon"),
    "motorcycle_right.png": ("a motorcycle", "a red motorcycle", "a motorbike that stands in a garage with tools"),
    "page.png": ("a page", "a page of a book", "printed text on paper"),
    "phantom.png": ("a scan", "a tomogram of a head", "a drawing of a head as a scanner sees it"),
    "retina.jpg": ("an eye", "a retina with its blood vessels", "the inside of an eye, orange and round"),
    "rocket.jpg": ("a rocket", "a rocket at night", "a white rocket that waits for its launch at dusk"),
    "text.png": ("handwriting", "letters and numbers by hand", "a note that somebody wrote by hand"),
}
_FRAMES = ("{}", "{}.", "a photo of {}", "a picture of {}", "an image of {}.", "this is {}", "here is {}.", "we see {}")

MODEL = {
    "embed_dim": 64,
    "vision": {
        "type": "vit", "image_resolution": 64, "patch_size": 16, "width": 128, "layers": 4, "heads": 4, "mlp_width": 512
    },
    "text": {"width": 64, "heads": 2, "mlp_width": 256, "layers": 2},
}  # fmt: skip
RECIPE = {
    "name": "stand_in",
    "model": MODEL,
    "batch_size": 24,  # each photograph once
    "total_steps": 600,
    "unroll": 4,
    "augment": {"crop": "resized", "scale": (0.4, 1.0), "color_jitter": (0.2, 0.2, 0.2, 0.0)},
    "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.1, "warmup_steps": 50},
    "log_every": 10,
    "checkpoint_every": 200,
    "keep_checkpoints": 1,
}


def weights(name: str = "ViT-B/32") -> str:
    """What the examples give to `clip_jax.load`: `name` where its file is here or can be fetched, else a stand-in.

    Prints which of the two it is. Call it before JAX touches a device: it also says where JAX keeps what it compiles.

    Args:
      name: of an official model.
    """
    keep_libtpu_quiet()
    keep_compiled_programs()
    try:
        fetch(name, patience=Patience(stall_seconds=10.0, attempts=2))
    except UserError as error:
        print(f"OpenAI's {name} cannot be had here:\n  {error}")
        return stand_in()
    print(f"The model is OpenAI's {name}.")
    return name


def stand_in() -> str:
    """The workdir of the stand-in, in the cache folder, trained if it is not there."""
    recipe = json.dumps([RECIPE, THINGS], sort_keys=True)
    folder = cache_folder() / "stand_in" / hashlib.sha256(recipe.encode()).hexdigest()[:8]
    workdir, steps = folder / "run", RECIPE["total_steps"]
    if steps not in steps_of(workdir):
        print(f"Training a stand-in, once: a tiny CLIP, {steps} steps, some minutes.", flush=True)
        train(folder / "photographs", workdir)
    print("The model is a stand-in that knows 24 photographs, those of the examples among them, and nothing else.")
    return str(workdir)


def train(photographs: Path, workdir: Path) -> None:
    """Train the stand-in, or go on where its training was interrupted."""
    from clip_jax.training.config import RunConfig
    from clip_jax.training.run import run

    write_photographs(photographs)
    values = {**RECIPE, "data": {"folder": {"path": str(photographs)}}}
    run(from_dict(RunConfig, values, "the stand-in's recipe"), str(workdir))


def write_photographs(folder: Path) -> None:
    """A folder with captions, as any other that `train.py` learns from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, things in THINGS.items():
        image = photograph(name)
        image.thumbnail((256, 256))
        image.save(folder / Path(name).with_suffix(".png"))
        captions = [frame.format(thing) for thing in things for frame in _FRAMES]
        (folder / name).with_suffix(".txt").write_text("\n".join(captions))


def photograph(name: str) -> Image.Image:
    """One of the photographs, on white where it is transparent."""
    image = Image.open(next(path for path in _places(name) if path.is_file())).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _places(name: str) -> Iterator[Path]:
    yield Path(skimage.data_dir) / name
    yield Path(sklearn.datasets.__file__).parent / "images" / name
    yield Path(matplotlib.get_data_path()) / "sample_data" / name
