"""Which metric a table's vector columns are searched with: what its metadata and indexes say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpu_lance.types import Metric

if TYPE_CHECKING:
    import lance

    from gpu_lance.index.config import Flat

METADATA_KEY = b"gpu_lance.indexes"


def read(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, str]]:
    """The index configurations in a schema's metadata, by column; {} if there are none.

    Examples
    --------
    >>> read({b"gpu_lance.indexes": b'{"v": {"type": "FLAT", "distance_type": "dot"}}'})
    {'v': {'type': 'FLAT', 'distance_type': 'dot'}}
    """
    try:
        found = json.loads((metadata or {}).get(METADATA_KEY, b"{}"))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(column): value for column, value in found.items() if isinstance(value, dict)}


def updated(metadata: Mapping[bytes, bytes] | None, column: str, config: Flat) -> dict[str, str]:
    """The metadata entry with another configuration for a column."""
    entry = {"type": "FLAT", "distance_type": str(config.metric)}
    return written({**read(metadata), column: entry})


def written(configs: Mapping[str, Any]) -> dict[str, str]:
    """The metadata entry of configurations by column, as :func:`read` gives them."""
    return {METADATA_KEY.decode(): json.dumps(configs)}


def metrics(dataset: lance.LanceDataset) -> dict[str, Metric]:
    """The metric of each vector column that has an index: our own configuration, else Lance's.

    A table that LanceDB indexed is searched by the metric of that index, as LanceDB does.
    """
    found: dict[str, Metric] = {}
    for index in dataset.describe_indices():
        details = index.details
        kind = details.get("metric_type") if isinstance(details, Mapping) else None
        if kind is not None and len(index.field_names) == 1:
            _note(found, index.field_names[0], kind)
    for column, config in read(dataset.schema.metadata).items():
        _note(found, column, config.get("distance_type"))
    return found


def _note(found: dict[str, Metric], column: str, kind: Any) -> None:
    try:
        found[column] = Metric.parse(kind)
    except ValueError:  # a metric of another writer, such as hamming
        return
