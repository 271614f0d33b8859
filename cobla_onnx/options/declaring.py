"""How an option is declared: what a field of a dataclass says of the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["Command", "Flag", "Group", "Option", "flag", "option"]

Command: TypeAlias = Literal["compress", "inspect", "sweep", "compare"]
# In the order in which the help shows them.
Group: TypeAlias = Literal["data", "search", "layers", "speed", "run"]


@dataclass(frozen=True)
class Flag:
    """An option as the command line has it; type and default are those of the field.

    Attributes
    ----------
    name : str
        With its dashes; ``--on/--off`` for a switch that is on by default.
    help : str
    metavar : str, optional
        What stands for the value in the help.
    minimum : float, optional
        The least number that is allowed.
    """

    name: str
    help: str
    metavar: str | None = None
    minimum: float | None = None


@dataclass(frozen=True)
class Option:
    """Where an option is to be had.

    Attributes
    ----------
    commands : tuple of str
        The commands, and functions of the Python API, that have it.
    group : str
        Options stand in the help by their groups, in a group as the fields do.
    flag : Flag, optional
        None: the command line does not have it as one option.
    parts : dataclass, optional
        The fields by which the command line has it instead, made with `flag`.
    """

    commands: tuple[Command, ...]
    group: Group
    flag: Flag | None = None
    parts: type | None = None


def flag(
    default: Any, name: str, help: str, metavar: str | None = None, minimum: float | None = None
) -> Any:
    """Declare a field that is a part of an option, see `Flag`."""
    return dataclasses.field(default=default, metadata={"flag": Flag(name, help, metavar, minimum)})


def option(
    commands: tuple[Command, ...],
    group: Group,
    default: Any,
    name: str | None = None,
    help: str = "",
    metavar: str | None = None,
    *,
    minimum: float | None = None,
    parts: type | None = None,
) -> Any:
    """Declare a field of `Settings` that is an option, see `Option` and `Flag`.

    Without a `name` it belongs to the Python API alone.
    """
    shown = None if name is None else Flag(name, help, metavar, minimum)
    declared = Option(commands, group, shown, parts)
    return dataclasses.field(default=default, metadata={"option": declared, "flag": shown})
