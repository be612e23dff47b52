"""Errors that a user can act on: the command line prints their message without a traceback."""

from __future__ import annotations


class MagsdError(Exception):
    """Base of every error whose message says what was wrong and what to do."""


class DataError(MagsdError):
    """Images, labels, masks or splits that cannot be used as they are."""


class UnknownLabelError(DataError):
    """A label that is none of the classes."""


class ConfigError(MagsdError):
    """A configuration key or value that is not valid."""


class RunError(MagsdError):
    """A run's folder or checkpoint that cannot be used as it is."""


class TrainingDiverged(MagsdError):
    """The loss became NaN or infinite; the last good checkpoint was kept."""
