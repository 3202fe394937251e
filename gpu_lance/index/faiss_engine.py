"""The engine over FAISS: its exact search by pointer, with no index and no copy of the rows.

FAISS never gets a selector: its GPU indexes ignore it, and on the CPU it turns BLAS off. Rows that
do not qualify are masked by torch, or the others are gathered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu_lance.errors import IndexBackendError
from gpu_lance.index.engines import (
    EXTRAS,
    FEW_QUERIES,
    Best,
    Block,
    checked,
    gathered,
    room,
)
from gpu_lance.index.faiss_binding import MAX_K, GpuResources, blas_threshold
from gpu_lance.index.threads import in_slices
from gpu_lance.index.torch_engine import TorchEngine
from gpu_lance.optional import require
from gpu_lance.types import Metric

if TYPE_CHECKING:
    import torch


class FaissEngine:
    """FAISS's exact search over the block's own memory: no index, and no copy of the rows.

    On the CPU the rows are dealt out to threads of ours, each of which calls FAISS
    single-threaded, see :mod:`gpu_lance.index.threads`.

    Parameters
    ----------
    faiss : module
        From :func:`~gpu_lance.index.faiss_binding.load_faiss`, for this device.
    device : torch.device
        CPU or CUDA.

    Examples
    --------
    >>> import torch
    >>> from gpu_lance.index.engines import Block
    >>> from gpu_lance.index.faiss_binding import load_faiss
    >>> engine = FaissEngine(load_faiss(torch.device("cpu"))[0], torch.device("cpu"))
    >>> block = Block(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, 5.0]))
    >>> query = torch.tensor([[3.0, 3.0]])
    >>> engine.nearest(block, Metric.L2, query, query.norm(dim=1), 2)[1].tolist()
    [[1, 0]]
    """

    is_faiss = True

    def __init__(self, faiss: Any, device: torch.device) -> None:
        self._faiss = faiss
        self._device = device.index or 0
        gpu = device.type == "cuda"
        self._resources = GpuResources.of(faiss, self._device) if gpu else None
        self.name = "faiss bfKnn" if gpu else "faiss knn"
        self._careful = TorchEngine(None if gpu else faiss)

    def serves(self, metric: Metric, block_dtype: torch.dtype, c: int, unit_norms: bool) -> bool:
        torch = require("torch", extra=EXTRAS)
        fits = c <= MAX_K and block_dtype == torch.float32
        return fits and (metric is not Metric.COSINE or unit_norms)

    def nearest(
        self,
        block: Block,
        metric: Metric,
        queries: torch.Tensor,
        query_norms: torch.Tensor,
        c: int,
        *,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Engine.nearest`. Under cosine all rows are unit vectors.

        Where a score could overflow torch does the work: FAISS loses a row whose score is NaN.
        """
        torch = require("torch", extra=EXTRAS)
        checked(block, queries, query_norms, c)
        n, m = len(block), len(queries)
        if c > MAX_K or block.vectors.dtype != torch.float32:
            raise IndexBackendError(
                f"FAISS gives at most {MAX_K} candidates of float32 rows, not {c} of "
                f"{block.vectors.dtype}."
            )
        if rows is not None:
            return gathered(self, block, metric, queries, query_norms, c, rows)
        if n == 0 or m == 0 or not block.is_safe(metric, query_norms):
            return self._careful.nearest(block, metric, queries, query_norms, c)
        l2 = metric is Metric.L2
        if self._resources is None and 1 < m <= FEW_QUERIES:  # FAISS's product, row by row
            return self._careful.nearest(block, metric, queries, query_norms, c)
        if self._resources is None:
            scores, columns = self._on_cpu(block, l2, queries, min(c, n))
        else:
            scores, columns = self._on_gpu(block, l2, queries, min(c, n))
        return scores, columns

    def _on_cpu(
        self, block: Block, l2: bool, queries: torch.Tensor, c: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        faiss, (n, ndims), m = self._faiss, block.vectors.shape, len(queries)
        squares = block.norms * block.norms if l2 else None

        def part(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            scores, columns = room(queries, min(c, stop - start))
            tensors = (queries, block.vectors[start:stop])
            x, y, values = (self._floats(tensor) for tensor in (*tensors, scores))
            ids = faiss.cast_integer_to_idx_t_ptr(columns.data_ptr())
            sizes = (ndims, m, stop - start, scores.shape[1])
            threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)  # of this thread
            try:
                if squares is None:
                    faiss.knn_inner_product(x, y, *sizes, values, ids)
                    scores.neg_().add_(1)
                else:
                    lengths = self._floats(squares[start:stop])
                    faiss.knn_L2sqr(x, y, *sizes, values, ids, lengths, None)
            finally:
                faiss.omp_set_num_threads(threads)
            return scores, columns.add_(start)

        kind = blas_threshold.LOOP if m == 1 else blas_threshold.PRODUCT
        with blas_threshold.at(faiss, kind):
            parts = in_slices(n, 4 * ndims, part)
        best = Best(c)
        for found in parts:
            best.add(*found)
        return parts[0] if len(parts) == 1 else best.sorted()

    def _on_gpu(
        self, block: Block, l2: bool, queries: torch.Tensor, c: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._resources is not None
        faiss = self._faiss
        scores, columns = room(queries, c)
        args = faiss.GpuDistanceParams()
        args.metric = faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT
        args.k, args.dims = c, queries.shape[1]
        args.vectorType = args.queryType = faiss.DistanceDataType_F32
        args.vectorsRowMajor = args.queriesRowMajor = True
        args.vectors, args.numVectors = self._floats(block.vectors), len(block)
        args.queries, args.numQueries = self._floats(queries), len(queries)
        squares = block.norms * block.norms if l2 else None
        if squares is not None:
            args.vectorNorms = self._floats(squares)
        args.outDistances = self._floats(scores)
        args.outIndices = faiss.cast_integer_to_idx_t_ptr(columns.data_ptr())
        args.outIndicesType = faiss.IndicesDataType_I64
        args.device, args.use_cuvs = self._device, False
        with self._resources.session():
            faiss.bfKnn(self._resources.handle, args)
        return (scores if l2 else scores.neg_().add_(1)), columns

    def _floats(self, tensor: torch.Tensor) -> Any:
        """The pointer to a float32 tensor; whoever calls keeps the tensor alive."""
        return self._faiss.cast_integer_to_float_ptr(tensor.data_ptr())
