"""Declare options: fields of a dataclass that also carry what the command line needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["Command", "Flag", "Group", "Option", "flag", "option"]

Command: TypeAlias = Literal["compress", "advise", "inspect", "sweep", "compare"]
# In the order in which the help shows them.
Group: TypeAlias = Literal["data", "search", "layers", "speed", "run"]


@dataclass(frozen=True)
class Flag:
    """How the command line shows an option; its type and default are those of the field.

    Attributes
    ----------
    name : str
        With its dashes; ``--on/--off`` for a switch that is on by default.
    help : str
    metavar : str, optional
        What stands for the value in the help.
    minimum, maximum : float, optional
        The least and the largest number that is allowed; no maximum without a minimum.
    """

    name: str
    help: str
    metavar: str | None = None
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Option:
    """Which commands have an option, and where in the help it stands.

    Attributes
    ----------
    commands : tuple of str
        The commands, and functions of the Python API, that have it.
    group : str
        The help lists options group by group, within a group in the order of the fields.
    parts : dataclass, optional
        The command line has its fields, made with `flag`, in place of one option.
    """

    commands: tuple[Command, ...]
    group: Group
    parts: type | None = None


def flag(default: Any, name: str, help: str, metavar: str | None = None) -> Any:
    """Declare a field that is one of the parts of an option; see `Flag`."""
    return dataclasses.field(default=default, metadata={"flag": Flag(name, help, metavar)})


def option(
    commands: tuple[Command, ...],
    group: Group,
    default: Any,
    name: str | None = None,
    help: str = "",
    metavar: str | None = None,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    parts: type | None = None,
) -> Any:
    """Declare a field of `Settings` that is an option; see `Option` and `Flag`.

    Without `name` and `parts` only the Python API has it.
    """
    shown = None if name is None else Flag(name, help, metavar, minimum, maximum)
    metadata = {"option": Option(commands, group, parts), "flag": shown}
    return dataclasses.field(default=default, metadata=metadata)
