"""Flower's `start_client`, imported without a database toolkit that it never uses.

That would be half of the import's processor time, and a third of its memory. Flower imports its stores with a client;
one of them keeps objects in a database, and is for other engines.
"""

import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

_DATABASE = "flwr.supercore.object_store.sql_object_store"


def _open_database(*arguments: Any, **options: Any) -> Any:
    from flwr.supercore.object_store.sql_object_store import SqlObjectStore

    return SqlObjectStore(*arguments, **options)


def _import_stores() -> None:
    """Import Flower's stores; the one in a database is imported when it is opened."""
    stand_in = ModuleType(_DATABASE)
    vars(stand_in)["SqlObjectStore"] = _open_database
    if sys.modules.setdefault(_DATABASE, stand_in) is stand_in:
        # A release that has other names here imports all of it below.
        with suppress(ImportError):
            import flwr.supercore.object_store  # noqa: F401
        del sys.modules[_DATABASE]


_import_stores()

# isort: split
from flwr.client import start_client as start_client  # noqa: E402
