"""What can go wrong, as a small hierarchy.

CoblaError
 ├── UsageError          exit 2   an option, a name or a path that cannot be used
 ├── ModelError          exit 3   the model is invalid, or is of a kind we cannot read
 │    └── PartError      exit 1   a part that we cut from the graph does not load: our fault
 ├── DataError           exit 3   the calibration data is invalid, or does not fit the model
 ├── BudgetError         exit 4   the budget cannot be met; names the smallest that can
 ├── VerificationError   exit 5   the result did not pass; nothing was written
 └── WriteError          exit 6   the result could not be written

Every message says what happened, why, and what to do next, with the name of the
file, node or option. The exit code of the command line is a class attribute.

Options are named by `wording.option_name`: ``str()`` of an error has Python's arguments, and
`CoblaError.in_flags` the flags of the command line.
"""

from __future__ import annotations

from cobla_onnx.wording import in_flags, in_python

__all__ = [
    "BudgetError",
    "CoblaError",
    "DataError",
    "ModelError",
    "PartError",
    "UsageError",
    "VerificationError",
    "WriteError",
]


class CoblaError(Exception):
    """Base of all errors that a user of cobla-onnx can do something about."""

    exit_code = 1

    @property
    def message(self) -> str:
        """The message with options in both spellings, to be part of another message."""
        return super().__str__()

    def __str__(self) -> str:
        return in_python(self.message)

    def in_flags(self) -> str:
        """Return the message as the command line and documents have it."""
        return in_flags(self.message)


class UsageError(CoblaError):
    """An option, a pattern, a name or a path that cannot be used."""

    exit_code = 2


class ModelError(CoblaError):
    """The model is invalid, or is of a kind that cannot be read."""

    exit_code = 3


class PartError(ModelError):
    """A part that was cut from the graph does not load, though the file as a whole does."""

    exit_code = 1


class DataError(CoblaError):
    """The calibration data is invalid, or does not fit the model."""

    exit_code = 3


class BudgetError(CoblaError):
    """The budget cannot be met; the message names the smallest that can.

    Attributes
    ----------
    least : dict of str to float
        For each budget that is out of reach, the least fraction that can be reached.
    parts : tuple of str
        Cause and advice, with options in both spellings, to be parts of another message.
    """

    exit_code = 4

    def __init__(
        self, message: str, least: dict[str, float] | None = None, advice: str = ""
    ) -> None:
        super().__init__(f"{message}; {advice}" if advice else message)
        self.least = dict(least or {})
        self.parts = message, advice


class VerificationError(CoblaError):
    """The compressed model did not pass verification; nothing was written."""

    exit_code = 5


class WriteError(CoblaError):
    """The result could not be written; what stood there before is as it was."""

    exit_code = 6
