"""Every exception that gpu_lance raises, each also a built-in one.

Catching :class:`GpuLanceError` catches all of them; catching the built-in type that LanceDB
raises in the same place works too.
"""

from __future__ import annotations


class GpuLanceError(Exception):
    """Base of every error that gpu_lance raises on purpose."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument; our messages are sentences
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class MissingExtraError(GpuLanceError, ImportError):
    """An optional package is not installed; the message holds the install line."""


class UnknownProviderError(GpuLanceError, KeyError):
    """No embedding function is registered under that name."""


class BrokenProviderError(GpuLanceError, ImportError):
    """An installed package announces an embedding function that cannot be imported."""


class ProviderTakenError(GpuLanceError, KeyError):
    """The alias belongs to a built-in provider."""


class EmbeddingError(GpuLanceError, RuntimeError):
    """An embedding function failed, or returned something other than one vector an item."""


class ApiError(EmbeddingError):
    """An API provider's server refused, failed, or gave an answer that cannot be used.

    `status_code` holds the HTTP status where there was one.
    """

    def __init__(self, message: str, status_code: int | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code


class ApiAccessError(ApiError, PermissionError):
    """The server of an API provider takes no requests with that key (HTTP 401 or 403)."""


class ApiConnectionError(ApiError, ConnectionError):
    """The server of an API provider cannot be reached, or did not answer in time."""


class FingerprintError(GpuLanceError, ValueError):
    """The vectors of a column were made by another model than the one in use."""


class ModelNotFoundError(GpuLanceError, FileNotFoundError):
    """A model's weights are in none of the places that were searched."""


class UntrustedModelError(GpuLanceError, ValueError):
    """A model wants to run code of its own, which the caller did not allow."""


class DeviceError(GpuLanceError, RuntimeError):
    """A device was asked for that is not there or does not work."""


class OutOfDeviceMemoryError(GpuLanceError, MemoryError):
    """Even one item does not fit on the device."""


class TableNotFoundError(GpuLanceError, ValueError):
    """No table of that name."""


class TableExistsError(GpuLanceError, ValueError):
    """There is a table of that name already."""


class StorageError(GpuLanceError, OSError, RuntimeError):
    """A table's files cannot be read or written: damaged, missing, or not allowed."""


class SchemaError(GpuLanceError, ValueError):
    """A schema or a column does not fit the data."""


class SchemaTypeError(GpuLanceError, TypeError):
    """A Python type that has no Arrow type."""


class BadInputError(GpuLanceError, ValueError):
    """A value that cannot be stored or embedded; the message names its row and column."""


class WrongTypeError(BadInputError, TypeError):
    """An argument of a type that it cannot have."""


class BadVectorError(BadInputError):
    """A vector with NaN, infinity, a wrong length, or zero norm under cosine."""


class QueryError(GpuLanceError, ValueError):
    """A search that cannot be run as asked."""


class IndexBackendError(GpuLanceError, RuntimeError):
    """FAISS failed, or would have ignored what it was asked for."""


class CommitConflictError(GpuLanceError, RuntimeError):
    """Another writer changed the same rows; nothing was written."""


class UnknownVariableError(GpuLanceError, KeyError, ValueError):
    """A ``$var:`` reference names a variable that is not set."""


class HardcodedSecretError(GpuLanceError, ValueError):
    """A secret was written out where only a ``$var:`` reference may stand."""


class MissingKeyError(GpuLanceError, ValueError):
    """An API provider has no key to authenticate with."""


class FetchError(GpuLanceError, ConnectionError):
    """A download failed; `status_code` holds the HTTP status where there was one."""

    def __init__(self, message: str, status_code: int | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code


class RefusedURLError(GpuLanceError, ValueError):
    """A URL that is not fetched: wrong scheme, a private address, or too large a body."""


class UnsupportedDataError(GpuLanceError, TypeError):
    """Data, or one row of it, of a kind that has no columns."""


class UnknownColumnError(QueryError, RuntimeError):
    """A search names a column that the table does not have."""


class QueryTypeError(QueryError, TypeError):
    """A query of a type that can be neither a vector nor embedded."""


class QueryTimeoutError(GpuLanceError, TimeoutError, RuntimeError):
    """A search took longer than its `timeout`."""
