"""Options are written once: a frozen dataclass is the only list of its fields.

    @dataclass(frozen=True)
    class OptimizerConfig:
        learning_rate: float = option(5e-4, "the peak")

Reading and writing plain values, overrides, the list that `--help_config` prints and the rule of what a run may go on
with all follow from it. A field's type is int, float, str, bool, a tuple or mapping of them, another such dataclass,
or a union. Dataclasses that stand for one another have a class attribute `TYPE`, which plain values give as `type`.
"""

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from clip_jax.errors import UserError

T = TypeVar("T")

_WORDS = {"true": True, "false": False, "none": None}


def option(default: Any = MISSING, help: str = "", may_change: bool = False) -> Any:
    """A field of a dataclass.

    Args:
      default: without one the option must be given.
      help: one line; what the value is, its unit, its choices.
      may_change: whether a run may go on with another value, because it does not change what is learned.
    """
    metadata = {"help": help, "may_change": may_change}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def inline(default: Any) -> Any:
    """A field that is a dataclass, whose options stand in plain values beside those of its parent."""
    return field(default=default, metadata={"inline": True})


def from_dict(cls: type[T], values: Any, origin: str, prefix: str = "") -> T:
    """An instance from plain values, as JSON and config files hold them.

    Args:
      cls: a dataclass.
      values: from the names of its options to their values; or a name, if it has a class method `named`.
      origin: where the values come from, for messages: "the config", say.
      prefix: what names begin with in messages: "optimizer.", say.

    Raises:
      UserError: a missing or unknown option, or a value of another type or out of its range.
    """
    if isinstance(values, str) and hasattr(cls, "named"):
        return cls.named(values)
    if not isinstance(values, Mapping):
        what = f"{origin}: {prefix[:-1]}" if prefix else origin
        raise UserError(f"{what} must hold the fields {', '.join(_kinds(cls))}; got {values!r}")
    for name in values:
        if name not in _kinds(cls) and not (name == "type" and hasattr(cls, "TYPE")):
            raise _unknown(origin, f"{prefix}{name}", [prefix + known for known in _kinds(cls)])
    return _build(cls, values, origin, prefix)


def to_dict(config: Any) -> dict[str, Any]:
    """Every option of an instance as plain values; `from_dict` is its inverse."""
    values = {"type": config.TYPE} if hasattr(config, "TYPE") else {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            values.update(to_dict(value) if _is_inline(item) else {item.name: to_dict(value)})
        else:
            values[item.name] = dict(value) if isinstance(value, Mapping) else value
    return values


def override(cls: type, values: Mapping[str, Any], name: str, text: str, origin: str) -> dict[str, Any]:
    """A copy of plain values with one of them replaced.

    Args:
      cls: the dataclass that they describe.
      values: may leave out options.
      name: dotted, of an option, of a group, or of an entry of a mapping.
      text: the new value; `from_dict` refuses it later if it is of the wrong type.
      origin: where the values come from, for messages.

    Raises:
      UserError: there is no such option; the message has the nearest names.
    """
    try:
        return _replaced(cls, values, name.split("."), text)
    except KeyError:
        raise _unknown(origin, name, list(dict(walk(cls)))) from None


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every option and group with its dotted name, a group before what it holds."""
    for item in fields(cls):
        if _is_inline(item):
            yield from walk(item.type, prefix)
            continue
        yield prefix + item.name, item
        for group in _groups(item.type):
            yield from walk(group, f"{prefix}{item.name}.")


def kept_values(config: Any, prefix: str = "") -> dict[str, Any]:
    """What a run must go on with: the values of all options but those that may change, by dotted name."""
    values = {f"{prefix}type": config.TYPE} if hasattr(config, "TYPE") else {}
    for item in fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if item.metadata.get("may_change"):
            continue
        if is_dataclass(value):
            values.update(kept_values(value, prefix if _is_inline(item) else f"{name}."))
        else:
            values.update(_flat(value, name))
    return values


def describe(groups: Mapping[str, type]) -> str:
    """Every option with its type, default and help, for a terminal.

    Args:
      groups: dataclasses by the names that their options begin with, without the last dot.
    """
    titles = {name: f"{name}: {cls.__doc__}" if name else "" for name, cls in groups.items()}
    sections = [section for name, cls in groups.items() for section in _sections(cls, name, titles[name])]
    names = max(len(name) for _, rows in sections for name, _, _ in rows)
    kinds = min(30, max(len(kind) for _, rows in sections for _, kind, _ in rows))
    lines = []
    for title, rows in sections:
        lines += ["", title] if title else []
        lines += [f"  {name:{names}}  {kind:{kinds}}  {help}".rstrip() for name, kind, help in rows]
    return "\n".join(lines)


def _build(cls: type[T], values: Mapping[str, Any], origin: str, prefix: str) -> T:
    arguments = {}
    for item in fields(cls):
        name = prefix + item.name
        if _is_inline(item):
            arguments[item.name] = _build(item.type, values, origin, prefix)
        elif item.name in values:
            arguments[item.name] = _converted(values[item.name], item.type, origin, name)
        elif item.default is item.default_factory is MISSING:
            raise UserError(f"{origin} needs a value for {name}: {item.metadata.get('help') or type_name(item.type)}")
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


def _converted(value: Any, kind: Any, origin: str, name: str) -> Any:
    """`value` as one of type `kind`: lists become tuples, whole numbers floats, and mappings dataclasses."""
    if is_dataclass(kind):
        return from_dict(kind, value, origin, f"{name}.")
    form, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return tuple(value) if isinstance(value, list) else value
    if form in (Union, UnionType):
        if _groups(kind) and isinstance(value, Mapping):
            return from_dict(_chosen(kind, value, f"{origin}: {name}"), value, origin, f"{name}.")
        for part in parts:
            with suppress(UserError):
                return _converted(value, part, origin, name)
    elif form is tuple and isinstance(value, list | tuple):
        kinds = [parts[0]] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(_converted(one, part, origin, f"{name}[{i}]") for i, (one, part) in pairs)
    elif form is not None and issubclass(form, Mapping) and isinstance(value, Mapping):
        return {str(key): _converted(one, parts[1], origin, f"{name}.{key}") for key, one in value.items()}
    elif kind is float and type(value) is int:
        with suppress(OverflowError):
            return float(value)
    elif type(value) is kind:
        return value
    raise UserError(f"{origin}: {name} must be of type {type_name(kind)}, like {_example(kind)}; got {value!r:.200}")


def _chosen(kind: Any, values: Mapping[str, Any], what: str) -> type:
    """Of a union's dataclasses, the one that `type` in the values names."""
    if len(_groups(kind)) == 1:
        return _groups(kind)[0]
    known = {group.TYPE: group for group in _groups(kind)}
    if values.get("type") not in known:
        raise UserError(f"{what}.type must be one of {', '.join(known)}; got {values.get('type')!r}")
    return known[values["type"]]


def _replaced(kind: Any, old: Any, names: Sequence[str], text: str) -> Any:
    """What stands in the place of `old`, of type `kind`, after the entry under `names` in it became `text`."""
    if not names:
        return _parsed(text, str if kind is Any and isinstance(old, str) else kind)
    values = to_dict(kind.named(old)) if isinstance(old, str) and hasattr(kind, "named") else old or {}
    name, *rest = names
    return {**values, name: _replaced(_entry_kind(kind, values, name), values.get(name), rest, text)}


def _entry_kind(kind: Any, values: Any, name: str) -> Any:
    """The type of the entry `name` of a group or mapping of type `kind`; KeyError if it has none."""
    if not isinstance(values, Mapping):
        raise KeyError(name)
    if is_dataclass(kind):
        return _kinds(kind)[name]
    if _groups(kind):
        return str if name == "type" else _kinds(_chosen(kind, values, "it"))[name]
    form = get_origin(kind)
    if isinstance(form, type) and issubclass(form, Mapping):
        return get_args(kind)[1]
    raise KeyError(name)


def _parsed(text: str, kind: Any) -> Any:
    """`text` as a plain value for an option of type `kind`; what is no Python literal stays text."""
    is_tuple = get_origin(kind) is tuple
    if kind is str or (str in get_args(kind) and text.lower() != "none" and text[:1] not in ("(", "[", "{")):
        return tuple(filter(None, text.split(","))) if is_tuple else text
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return (value,) if is_tuple and not isinstance(value, list | tuple) else value


def _sections(cls: type, name: str, title: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """(title, rows) of a group's own options, then of the groups in it."""
    own, prefix = list(_own_fields(cls)), f"{name}." if name else ""
    yield title, [_row(item, prefix) for item in own if not _groups(item.type)]
    for item in own:
        for group in _groups(item.type):
            kind = f", type={group.TYPE}" if hasattr(group, "TYPE") else ""
            yield from _sections(group, prefix + item.name, f"{prefix}{item.name}{kind}: {item.metadata.get('help')}")


def _row(item: Field, prefix: str) -> tuple[str, str, str]:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    kind = type_name(item.type) + ("" if default is MISSING else f" = {default!r}")
    return prefix + item.name, kind, item.metadata.get("help", "") + " *" * item.metadata.get("may_change", False)


def type_name(kind: Any) -> str:
    """A type as messages call it."""
    form, parts = get_origin(kind), get_args(kind)
    if form in (Union, UnionType):
        return " or ".join("None" if part is NoneType else type_name(part) for part in parts)
    if form is tuple:
        return f"tuple of {'' if parts[1:] == (...,) else f'{len(parts)} '}{type_name(parts[0])}"
    return "mapping" if form else getattr(kind, "__name__", str(kind))


def _example(kind: Any) -> str:
    """A value of type `kind`, for messages."""
    form, parts = get_origin(kind), get_args(kind)
    if form in (Union, UnionType):
        return _example(parts[0])
    if form is tuple:
        return f"({', '.join([_example(parts[0])] * (2 if parts[1:] == (...,) else len(parts)))})"
    if form is not None:
        return f"{{'name': {_example(parts[1])}}}"
    return {int: "8", float: "0.1", str: "'text'", bool: "True"}.get(kind, "...")


def _own_fields(cls: type) -> Iterator[Field]:
    """The fields of a dataclass, in place of an inline one those of its dataclass."""
    for item in fields(cls):
        yield from _own_fields(item.type) if _is_inline(item) else (item,)


def _kinds(cls: type) -> dict[str, Any]:
    """The types of a dataclass's options by their names in plain values."""
    return {item.name: item.type for item in _own_fields(cls)}


def _groups(kind: Any) -> list[type]:
    """The dataclasses that a value of type `kind` can be."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [part for part in parts if is_dataclass(part)]


def _is_inline(item: Field) -> bool:
    return item.metadata.get("inline", False)


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for part, one in value.items() for key, leaf in _flat(one, f"{name}.{part}").items()}


def _unknown(origin: str, name: str, known: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=3) or [one for one in known if "." not in one] or known
    return UserError(f"{origin} has no field {name!r}; did you mean {', '.join(near)}?")
