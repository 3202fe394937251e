"""What a search needs to know of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lance
    import pyarrow as pa
    import torch

    from gpu_lance.embeddings import EmbeddingFunctionConfig
    from gpu_lance.index import ColumnIndex, MultiColumnIndex
    from gpu_lance.types import Embeddings, Metric


class SearchTarget(Protocol):
    """A table, as a search sees it: rows in Lance, indexes on a device, embedding functions.

    A search takes `dataset()` once and asks everything of that handle, so that the index and the
    rows that it returns belong to one version.
    """

    @property
    def name(self) -> str:
        """The table's name, for messages."""

    @property
    def device(self) -> torch.device:
        """Where queries are embedded and vectors are searched."""

    @property
    def schema(self) -> pa.Schema:
        """The table's schema at the version to read."""

    @property
    def embedding_functions(self) -> Mapping[str, EmbeddingFunctionConfig]:
        """Which function makes which vector column, by vector column."""

    def dataset(self) -> lance.LanceDataset:
        """The dataset at the version to read: the latest, or the one that was checked out."""

    def column_index(
        self, column: str, dataset: lance.LanceDataset | None = None
    ) -> ColumnIndex | MultiColumnIndex:
        """The index of a vector column, as `dataset` or the version to read has it."""

    def default_metric(self, column: str, dataset: lance.LanceDataset | None = None) -> Metric:
        """The metric of a search that names none."""

    def embed_query(self, column: str, items: list[Any]) -> Embeddings:
        """Vectors of items on the device, by the column's embedding function; all are valid."""
