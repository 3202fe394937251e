"""Cut sorted items into batches that a device can hold, and halve them when it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu_lance.device import is_out_of_memory, release_cache
from gpu_lance.errors import OutOfDeviceMemoryError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class Budget:
    """How much one forward may take; it shrinks when the device runs out of memory.

    Parameters
    ----------
    cost : int or None
        The most that (items x the largest cost among them) may be; None for no limit.
    items : int or None
        The most items; None for no limit.
    """

    cost: int | None = None
    items: int | None = None
    told: bool = False

    def shrink(self, count: int, largest: int) -> None:
        """Allow half of a batch of `count` items, the costliest costing `largest`."""
        half = max(1, count // 2)
        self.cost = half * max(1, largest)
        if self.items is not None:
            self.items = max(1, min(self.items, half))


def next_batch(costs: np.ndarray, start: int, budget: Budget) -> int:
    """Return where the batch that begins at `start` ends; it holds at least one item.

    Parameters
    ----------
    costs : numpy.ndarray
        (n,), of all items, descending.
    start : int
        The first item of the batch.
    budget : Budget
        Its limits.

    Examples
    --------
    >>> next_batch(np.array([9, 5, 5, 1]), 0, Budget(cost=20))
    2
    """
    count = len(costs) - start
    if budget.cost is not None:
        # descending: the first item is the costliest, and padding would make all cost as much
        count = min(count, budget.cost // max(1, int(costs[start])))
    if budget.items is not None:
        count = min(count, budget.items)
    return start + max(1, count)


def run_batches(
    costs: np.ndarray,
    budget: Budget,
    forward: Callable[[int, int], torch.Tensor],
    device: torch.device,
    what: str,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Run `forward` over all items in batches; halve a batch for which memory runs out.

    Parameters
    ----------
    costs : numpy.ndarray
        (n,), descending.
    budget : Budget
        Shrinks, for this call and later ones, when memory runs out.
    forward : callable
        Takes the first item and the end of a batch.
    device : torch.device
        Where it runs.
    what : str
        The name of the model, for messages.

    Yields
    ------
    tuple of int, int, torch.Tensor
        First item, end, and what `forward` gave.

    Raises
    ------
    OutOfDeviceMemoryError
        If a single item does not fit.
    """
    start = 0
    while start < len(costs):
        end = next_batch(costs, start, budget)
        try:
            made = forward(start, end)
        except OutOfDeviceMemoryError:
            raise  # not even the model fits
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error if end - start == 1 else None
        else:
            yield start, end, made
            start = end
            continue
        # here the error's traceback is gone, and with it the tensors that its frames held
        release_cache(device)
        if failure is not None:
            raise OutOfDeviceMemoryError(
                f"{what}: one item of cost {int(costs[start])} does not fit on {device}. Free "
                "memory there, use dtype='bfloat16' or a smaller model, or shorten the item."
            ) from failure
        budget.shrink(end - start, int(costs[start]))
        if not budget.told:
            budget.told = True
            logger.warning(
                "%s: a batch of %d items ran out of memory on %s; batches are halved. Pass a "
                "smaller batch_size to avoid the attempt.",
                what,
                end - start,
                device,
            )
