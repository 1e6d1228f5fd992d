"""Prompt templates: sentences around a class name, whose embeddings are averaged (paper section 3.1.4)."""

from collections.abc import Sequence

# For data sets without templates of their own: the paper's default prompt.
DEFAULT_TEMPLATES = ("a photo of a {}.",)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "shapes": (
        "a {}",
        "a photo of a {}",
        "a picture of a {}",
        "an image of a {}",
        "there is a {}",
        "a drawing of a {}",
    ),
    "digits": ("a photo of the digit {}", "a handwritten {}", "the number {}", "a picture of the number {}"),
}
TEMPLATES["shapes_seen"] = TEMPLATES["shapes"]


def templates_for(dataset: str) -> tuple[str, ...]:
    """The templates of a data set."""
    return TEMPLATES.get(dataset, DEFAULT_TEMPLATES)


def fill(templates: Sequence[str], class_name: str) -> list[str]:
    """Every template with the class name in it."""
    return [template.format(class_name) for template in templates]
