"""What a field that an embedding function fills takes as its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from gpu_lance.device import as_tensor, to_host
from gpu_lance.errors import EmbeddingError


def as_lists(value: Any) -> Any:
    """An array of any library, on any device, as nested lists of numbers; else `value` itself.

    Parameters
    ----------
    value : numpy.ndarray, torch.Tensor, cupy.ndarray, any DLPack array, pyarrow.Array, or object
        Told by its attributes, so that no library is imported for it.

    Examples
    --------
    >>> as_lists(np.array([1.0, 2.0], np.float16)), as_lists((1, 2))
    ([1.0, 2.0], (1, 2))
    """
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return value.to_pylist()
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "__dlpack__") or isinstance(value, np.generic):
            return value
        value = to_host(as_tensor(value))
    return value.tolist()


def ndims_of(function: Any) -> int:
    """What `function.ndims()` says, if it can be the length of a vector.

    Raises
    ------
    EmbeddingError
        If it is no whole number of at least 1.
    """
    ndims = function.ndims()
    if isinstance(ndims, bool) or not hasattr(ndims, "__index__") or ndims < 1:
        raise EmbeddingError(
            f"{type(function).__name__}.ndims() returned {ndims!r}; it must be a whole number of "
            "at least 1."
        )
    return int(ndims)


@dataclass(frozen=True)
class FilledLater:
    """Pydantic metadata of a vector field: None until it is embedded, and arrays beside lists."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.nullable_schema(
            core_schema.no_info_before_validator_function(as_lists, handler(source))
        )
