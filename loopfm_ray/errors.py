"""Every error that users of the package can meet.

    LoopFMError
    |- ConfigError (ValueError)     a setting is wrong: exit code 2
    |- DataError (ValueError)       a value in the data is wrong
    |  |- SchemaError               a column is missing or has the wrong type
    |  '- LeakError                 a row saw what was not visible at its request
    |- ShapeError (ValueError)      tensors or columns do not fit together
    |- MetricError (ValueError)     a metric is undefined on these rows
    |- StoreError (RuntimeError)    a dataset version is missing, damaged or does not match
    |  '- UnreachableError          the server that holds it does not answer
    |- BundleError (RuntimeError)   a bundle can not be loaded or does not match its features
    '- JobError (RuntimeError)      a Ray program failed

An error takes one string, so it survives pickling between processes. The message says what failed, what was found,
what was expected and what to do next.
"""

__all__ = [
    "BundleError",
    "ConfigError",
    "DataError",
    "JobError",
    "LeakError",
    "LoopFMError",
    "MetricError",
    "SchemaError",
    "ShapeError",
    "StoreError",
    "UnreachableError",
]


class LoopFMError(Exception):
    """The root of all errors that this package raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigError(LoopFMError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(LoopFMError, ValueError):
    """A value in the data is not acceptable."""


class SchemaError(DataError):
    """A column is missing or has the wrong type."""


class LeakError(DataError):
    """A row holds a value that was not visible at its request time."""


class ShapeError(LoopFMError, ValueError):
    """Tensors or columns do not fit together."""


class MetricError(LoopFMError, ValueError):
    """A metric is undefined on these rows."""


class StoreError(LoopFMError, RuntimeError):
    """A dataset version is missing, damaged or does not match."""


class UnreachableError(StoreError):
    """A server that holds versions does not answer, or not in time."""


class BundleError(LoopFMError, RuntimeError):
    """A bundle can not be loaded or does not match the features it is served with."""


class JobError(LoopFMError, RuntimeError):
    """A Ray program failed."""
