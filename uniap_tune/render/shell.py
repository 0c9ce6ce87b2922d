"""Shell scripts from templates. Whatever comes from an input goes through ``quote`` or ``comment``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from uniap_tune import __version__


@dataclass(frozen=True, slots=True)
class Variable:
    """A value the user may give in the environment: ``${name:-default}``."""

    name: str
    default: str | int | float


Value = str | int | float | bool | Variable
Arguments = Mapping[str, Value]  # an argument and its value; ``True``: a switch


def quote(value: Value) -> str:
    """A value as one word of a POSIX shell."""
    if isinstance(value, Variable):
        return f'"${{{value.name}:-{number(value.default)}}}"'
    text = number(value)
    # A bare comma in an array looks like a separator, though it is none (shellcheck SC2054).
    return f"'{text}'" if "," in text and shlex.quote(text) == text else shlex.quote(text)


def number(value: str | int | float) -> str:
    """Text of a value, numbers in the shortest form that reads back as the same number."""
    return repr(value) if isinstance(value, float) else str(value)


def comment(text: object) -> str:
    """Text that stays inside a comment line whatever is in it."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def script(template: str, **values: object) -> str:
    """A script from the template of this name."""
    return _environment().get_template(template).render(version=__version__, **values)


@cache
def _environment() -> Environment:
    environment = Environment(  # shell, not HTML: escaping is the filters' work
        loader=PackageLoader("uniap_tune.templates", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = quote
    environment.filters["comment"] = comment
    return environment
