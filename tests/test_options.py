"""Options written once: plain values in and out, overrides, help and what a run must keep, all from the dataclass."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest

from clip_jax import options
from clip_jax.errors import UserError
from clip_jax.options import inline, option


@dataclass(frozen=True)
class Circle:
    TYPE: ClassVar[str] = "circle"
    radius: float = option(help="in metres")


@dataclass(frozen=True)
class Square:
    TYPE: ClassVar[str] = "square"
    side: float = option(help="in metres")
    corners: tuple[int, int] = option((1, 2), "two of them")

    def __post_init__(self):
        if self.side <= 0:
            raise UserError(f"side must be above 0, got {self.side}")

    @classmethod
    def named(cls, name):
        if name != "unit":
            raise UserError(f"unknown square {name}")
        return cls(1.0)


@dataclass(frozen=True)
class Speed:
    pieces: int = option(1, "at a time", may_change=True)
    exact: bool = option(True, "or fast")


@dataclass(frozen=True)
class Drawing:
    title: str = option(help="what to call it")
    shape: Circle | Square = option(help="what to draw")
    frame: Square = option(Square(2.0), "around it")
    speed: Speed = inline(Speed())
    tags: tuple[str, ...] = option((), "any")
    limit: int | None = option(None, "none for no limit")
    layers: Mapping[str, Mapping[str, float]] = option({}, "numbers by name")


PLAIN = {"title": "a", "shape": {"type": "circle", "radius": 2}}
FULL = {
    **{"title": "b", "pieces": 3, "exact": False, "tags": ["x"], "limit": 4, "layers": {"one": {"n": 1}}},
    "shape": {"type": "square", "side": 1.5, "corners": [3, 4]},
    "frame": {"side": 3.0, "type": "square", "corners": [1, 2]},
}


def read(values):
    return options.from_dict(Drawing, values, "the file")


def test_what_is_left_out_has_its_default():
    assert read(PLAIN) == Drawing("a", Circle(2.0))


def test_plain_values_survive_json():
    drawing = read(FULL)
    assert drawing == Drawing(
        "b", Square(1.5, (3, 4)), Square(3.0), Speed(3, False), ("x",), 4, {"one": {"n": 1.0}}
    )  # fmt: skip
    assert isinstance(drawing.layers["one"]["n"], float)
    assert json.loads(json.dumps(options.to_dict(drawing))) == FULL
    assert read(json.loads(json.dumps(options.to_dict(drawing)))) == drawing


def test_a_name_stands_for_a_group():
    assert read({**PLAIN, "frame": "unit"}).frame == Square(1.0)
    assert options.override(Drawing, {**PLAIN, "frame": "unit"}, "frame.corners", "5,6", "it")["frame"] == {
        **{"type": "square", "side": 1.0, "corners": (5, 6)}
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "a"}, "the file has no field 'titel'; did you mean title?"),
        ({"shape": {"type": "circle", "radus": 1.0}}, "has no field 'shape.radus'; did you mean shape.radius"),
        ({"shape": {"type": "circle"}}, "the file needs a value for shape.radius: in metres"),
        ({"shape": {"type": "star"}}, "shape.type must be one of circle, square; got 'star'"),
        ({"shape": {"radius": 1.0}}, "shape.type must be one of circle, square; got None"),
        ({"shape": 3}, "shape must be of type Circle or Square"),
        ({"shape": {"type": "square", "side": -1}}, "the file: side must be above 0, got -1.0"),
        ({"frame": 3}, "frame must hold the fields side, corners; got 3"),
        ({"frame": "other"}, "unknown square other"),
        ({"pieces": 1.0}, "the file: pieces must be of type int, like 8; got 1.0"),
        ({"pieces": True}, "pieces must be of type int"),
        ({"exact": 1}, "exact must be of type bool, like True; got 1"),
        ({"tags": "x"}, r"tags must be of type tuple of str, like \('text', 'text'\); got 'x'"),
        ({"tags": ["x", 3]}, r"tags\[1\] must be of type str"),
        ({"limit": "3"}, "limit must be of type int or None"),
        ({"layers": {"one": 3}}, "layers.one must be of type mapping, like {'name': 0.1}; got 3"),
        ({"layers": {"one": {"n": "x"}}}, "layers.one.n must be of type float"),
        ({"frame": {"side": 10**400}}, "frame.side must be of type float"),
        ({"frame": {"side": 1.0, "corners": [1, 2, 3]}}, "frame.corners must be of type tuple of 2 int"),
    ],
)
def test_a_wrong_value_is_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read({**PLAIN, **changes})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_value_says_what_it_is():
    with pytest.raises(UserError, match="the file needs a value for title: what to call it"):
        read({"shape": PLAIN["shape"]})
    with pytest.raises(UserError, match=r"the file must hold the fields title, shape, .*; got 3"):
        read(3)


@pytest.mark.parametrize(
    ("name", "text", "get", "value"),
    [
        ("title", "3", lambda drawing: drawing.title, "3"),
        ("pieces", "7", lambda drawing: drawing.speed.pieces, 7),
        ("exact", "false", lambda drawing: drawing.speed.exact, False),
        ("shape.radius", "1e-4", lambda drawing: drawing.shape.radius, 1e-4),
        ("shape", "{'type': 'square', 'side': 2}", lambda drawing: drawing.shape, Square(2.0)),
        ("frame", "unit", lambda drawing: drawing.frame, Square(1.0)),
        ("frame.corners", "(5, 6)", lambda drawing: drawing.frame.corners, (5, 6)),
        ("tags", "a,b", lambda drawing: drawing.tags, ("a", "b")),
        ("tags", "1", lambda drawing: drawing.tags, ("1",)),
        ("tags", "", lambda drawing: drawing.tags, ()),
        ("tags", "('a', 'b,c')", lambda drawing: drawing.tags, ("a", "b,c")),
        ("limit", "8", lambda drawing: drawing.limit, 8),
        ("limit", "none", lambda drawing: drawing.limit, None),
        ("layers.two.m", "3", lambda drawing: drawing.layers, {"two": {"m": 3.0}}),
    ],
)
def test_overrides(name, text, get, value):
    values = {**PLAIN, "frame": {"side": 1.0}}
    assert get(read(options.override(Drawing, values, name, text, "the file"))) == value
    assert values == {**PLAIN, "frame": {"side": 1.0}}


@pytest.mark.parametrize(
    ("name", "near"),
    [("shape.radus", "shape.radius"), ("piecs", "pieces"), ("frame.side.x", "frame.side"), ("?", "title")],
)
def test_a_misspelt_override_is_told_the_nearest_names(name, near):
    with pytest.raises(UserError, match=f"has no field {name!r}; did you mean {near}".replace("?'", r"\?'")):
        options.override(Drawing, PLAIN, name, "1", "the file")


def test_what_a_run_must_keep():
    drawing = read(FULL)
    kept = options.kept_values(drawing)
    assert "pieces" not in kept
    assert kept["exact"] is False and kept["layers.one.n"] == 1.0 and kept["shape.type"] == "square"
    faster = dataclasses.replace(drawing, speed=dataclasses.replace(drawing.speed, pieces=9))
    assert options.kept_values(faster) == kept
    assert options.kept_values(dataclasses.replace(drawing, shape=Circle(1.0))) != kept


def test_the_list_has_every_option_its_default_and_its_line():
    lines = [" ".join(line.split()) for line in options.describe({"": Drawing, "more": Speed}).splitlines()]
    assert "more.exact bool = True or fast" in lines
    assert "title str what to call it" in lines
    assert "pieces int = 1 at a time *" in lines
    assert "shape.radius float in metres" in lines
    assert "shape, type=square: what to draw" in lines
    assert "frame.corners tuple of 2 int = (1, 2) two of them" in lines
    assert "limit int or None = None none for no limit" in lines
