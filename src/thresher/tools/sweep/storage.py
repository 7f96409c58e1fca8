"""The storage of a study: SQLite, PostgreSQL or a journal file, opened so that many drivers can share it."""

import time
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import event, make_url
from sqlalchemy.engine import Engine
from sqlalchemy.exc import ArgumentError, DatabaseError

PATIENCE = 60.0  # seconds that a driver waits for the others' writes
KINDS = "sqlite:///FILE, postgresql://USER@HOST/DATABASE, journal:FILE"


def open_storage(url: str) -> BaseStorage:
    """Open a storage; create it where it does not exist.

    Raises:
        ValueError: The address is of no known kind, or its driver is not installed.
        ConnectionError: There is no answer at the address.
    """
    if url.startswith("journal:"):
        path = Path(url.removeprefix("journal:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise ValueError(f"storage={hide_password(url)} is not an address. There are: {KINDS}") from error
    backend = address.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise ValueError(f"storage={hide_password(url)} is of another kind. There are: {KINDS}")
    arguments: dict[str, object] = {}
    if backend == "sqlite":
        if not address.database or address.database == ":memory:":
            raise ValueError("storage=sqlite: needs a file, as in sqlite:///runs/mine/study.db")
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        arguments = {"connect_args": {"timeout": PATIENCE}}
    elif address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
        arguments = {"pool_pre_ping": True}  # a server that was started again ends old connections
    storage = _open(address.render_as_string(hide_password=False), arguments)
    if backend == "sqlite":
        _serialise(storage.engine)
    return optuna.storages.get_storage(storage)


def _open(url: str, arguments: dict[str, object]) -> RDBStorage:
    """Open a database; retry if another driver creates its tables at the same moment."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return RDBStorage(url, engine_kwargs=dict(arguments))
        except ImportError as error:
            raise ValueError(f"storage={hide_password(url)} needs a driver: pip install 'thresher[sweep]'") from error
        except (DatabaseError, optuna.exceptions.StorageInternalError) as error:
            if time.monotonic() > deadline:
                reason = str(error.__cause__ or error).splitlines()[0]
                raise ConnectionError(f"storage={hide_password(url)} cannot be opened: {reason}") from error
            time.sleep(0.2)


def _serialise(engine: Engine) -> None:
    """Let every transaction take the write lock of SQLite when it begins.

    Optuna reads a state and then writes it, and relies on row locks in between, which SQLite does not have: two drivers
    could start the same trial.
    """

    @event.listens_for(engine, "connect")
    def connect(connection, record) -> None:  # type: ignore[no-untyped-def]
        connection.isolation_level = None  # the driver itself would begin only at the first write

    @event.listens_for(engine, "begin")
    def begin(connection) -> None:  # type: ignore[no-untyped-def]
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that were made before


def hide_password(url: str) -> str:
    """Return an address without its password."""
    if url.startswith("journal:"):
        return url
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url.rpartition("@")[2]
