"""A search's plan in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lance

    from gpu_lance.query.execution import Report
    from gpu_lance.query.spec import VectorSpec


def describe(
    spec: VectorSpec,
    report: Report,
    index: Mapping[str, Any],
    dataset: lance.LanceDataset,
    verbose: bool,
) -> str:
    """How a search ran, one thing a line.

    Parameters
    ----------
    spec : VectorSpec
    report : Report
        Of the search.
    index : mapping
        What the index holds; see ``ColumnIndex.info``.
    dataset : lance.LanceDataset
    verbose : bool
        Also sizes and times.
    """
    refresh = index["refresh"]
    why = f" ({refresh['reason']})" if refresh["reason"] else ""
    asked = f"k={report.k} (limit={spec.limit}, offset={spec.offset})"
    lines = [
        f"VectorSearch: column={spec.column}, metric={spec.metric}, {asked}",
        f"  Queries: {spec.queries.kind()}",
        f"  Device: {index['device']}",
        f"  Engine: {index['engine']} ({index['reason']}), exact",
        f"  Held: {_held(index)}",
        f"  Rows: held={index['rows']}, scanned={index['scanned']}, found={report.found}",
        f"  Version: {report.version}",
        f"  Refresh: {refresh['kind']}{why}",
        f"  Filter: {_filter(spec)}",
    ]
    if spec.lower is not None or spec.upper is not None:
        lines.append(f"  Distances: {_range(spec)}, inside the scan")
    if spec.order_by:
        keys = (f"{o.column_name} {'asc' if o.ascending else 'desc'}" for o in spec.order_by)
        lines.append(f"  Order: {', '.join(keys)}, of the rows found")
    if spec.settings:
        each = ", ".join(f"{name}={value}" for name, value in spec.settings.items())
        lines.append(f"  No effect on an exact index: {each}")
    columns = ", ".join(spec.columns) if spec.columns else "all columns"
    lines.append(f"  Fetch: {columns} from Lance by row id")
    if verbose:
        stable = "stable" if dataset.has_stable_row_ids else "not stable, so every change rebuilds"
        lines.append(f"  Row ids: {stable}")
        lines.append(f"  Bytes held: {index['bytes']}")
        lines.append(f"  Refresh took: {1e3 * refresh['seconds']:.3f} ms")
        for stage, took in report.seconds.items():
            lines.append(f"  Stage {stage}: {1e3 * took:.3f} ms")
    return "\n".join(lines)


def _held(index: Mapping[str, Any]) -> str:
    where = "not, searched from Lance" if index["step"] == "lance" else f"as {index['step']}"
    return f"{where} ({index['plan']})"


def _filter(spec: VectorSpec) -> str:
    if spec.where is None:
        return "none"
    if spec.prefilter:
        return f"{spec.where}, before the search: Lance gives the row ids, the scan skips others"
    return f"{spec.where}, after the search: on the {spec.limit} nearest rows"


def _range(spec: VectorSpec) -> str:
    lower = "" if spec.lower is None else f"{spec.lower} <= "
    upper = "" if spec.upper is None else f" < {spec.upper}"
    return f"{lower}distance{upper}"
