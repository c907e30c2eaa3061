"""Where the study of a sweep is kept: a journal file, or a database by address."""

from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from loopfm_ray.errors import StoreError
from loopfm_ray.sweep.config import SweepConfig

__all__ = ["open_storage", "without_secret"]


def open_storage(config: SweepConfig) -> BaseStorage:
    """Open what keeps the study of a sweep.

    Raises:
        StoreError: it can not be opened.
    """
    address = config.storage or str((config.root / "study.log").absolute())
    try:
        if "://" in address:
            return RDBStorage(address)
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(address))
    except Exception as error:  # drivers of databases raise whatever they like
        raise StoreError(
            f"the study of sweep {config.name} can not be opened at {without_secret(address)}: {type(error).__name__}:"
            f" {error}; give a file ending in .log, sqlite:///FILE or postgresql://USER@HOST/NAME in storage"
        ) from error


def without_secret(address: str) -> str:
    """Return an address without the user and password in it, for messages."""
    before, at, after = address.rpartition("@")
    return f"{before.partition('://')[0]}://***@{after}" if at else address
