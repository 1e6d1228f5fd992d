"""Convert CLIP weights between PyTorch and JAX, both ways, and prove that they are the same model.

  python convert_torch_weights.py ViT-B/32 vit_b32                       OpenAI's weights, downloaded
  python convert_torch_weights.py model.safetensors DST --activation gelu
  python convert_torch_weights.py model.safetensors DST --model_config ViT-H-14.json
  python convert_torch_weights.py vit_b32 vit_b32_hf --to huggingface --verify

SRC is an official name (RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px); a .pt
(TorchScript or state dict), .bin or .safetensors file; a folder of transformers or of open_clip; a name on the Hugging
Face hub (ORG/NAME or hf-hub:ORG/NAME); a model folder; or a training workdir (its newest step), WORKDIR@best or one
step's folder, each with @ema for the moving average of the weights. DST must not exist: a file for openai, a folder for
the other formats. Code in files is never executed.
"""

import argparse
from collections.abc import Sequence

import installed  # noqa: F401  (first: it says what to do where the requirements are missing)
from clip_jax import cli
from clip_jax.errors import UserError
from clip_jax.models.config import ACTIVATIONS
from clip_jax.weights.formats import WRITERS, load_variables, locate, save, without_head


def main(argv: Sequence[str]) -> int:
    """Parse the flags, convert, and compare if asked to; 1 if the comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="what to convert, see above")
    parser.add_argument("target", metavar="DST", help="where to write it")
    parser.add_argument(
        "--to",
        choices=WRITERS,
        default="jax",
        help="jax: a folder for clip_jax.load (the default); openai: a float32 state dict for clip.model.build_model; "
        "open_clip: a folder for local-dir:DST; huggingface: a folder for transformers.CLIPModel; all but jax leave a "
        "classification head out, which they have no place for",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the same random inputs through the PyTorch side and through clip_jax and print how far every layer "
        "and output differ; exit 1 if out of tolerance (needs requirements-test.txt)",
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, help="for a bare file of weights that does not say it")
    parser.add_argument(
        "--model_config",
        metavar="FILE",
        help="for a bare file of weights that does not show what the model is: open_clip's model_configs/NAME.json, "
        "which says the activation too",
    )
    parser.add_argument(
        "--download_root",
        metavar="DIR",
        help="where downloads are kept (default: $CLIP_JAX_CACHE or ~/.cache/clip_jax); $CLIP_JAX_MIRROR replaces "
        "OpenAI's address",
    )
    flags = parser.parse_args(argv)
    source = locate(flags.source, flags.download_root)
    if flags.verify and source[0] == flags.to == "jax":
        raise UserError("--verify compares with PyTorch, but both SRC and DST are model folders of clip_jax")
    config, variables = load_variables(source[1], activation=flags.activation, model_config=flags.model_config)
    save(flags.target, config, variables, flags.to)
    print(f"{flags.source} -> {flags.target} ({flags.to})")
    return _verified(source, locate(flags.target)) if flags.verify else 0


def _verified(source: tuple, target: tuple) -> int:
    """Compare the PyTorch side of the conversion with the weights that were written; 1 if they differ."""
    from clip_jax.weights.verify import report, verify

    (form, path), (_, other) = (target, source) if source[0] == "jax" else (source, target)
    rows = verify(form, path, *without_head(*load_variables(other)))
    print(report(rows))
    return 0 if all(row.within for row in rows) else 1


if __name__ == "__main__":
    cli.run(main)
