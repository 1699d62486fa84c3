"""Stand-in: makes requests from JSON, each value of exactly the type that its field has, as dacite does."""

from __future__ import annotations

import dataclasses
import types
import typing


def from_dict(data_class, data):
    fields = typing.get_type_hints(data_class)
    assert set(data) <= set(fields), data
    return data_class(**{name: _value(fields[name], value) for name, value in data.items()})


def _value(kind, value):
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        assert type(value) is list
        return [_value(arguments[0], entry) for entry in value]
    kinds = arguments if origin in (types.UnionType, typing.Union) else (origin or kind,)
    assert type(value) in kinds, (kind, value)
    return value
