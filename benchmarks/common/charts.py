"""Charts in a file, so that nothing that is measured draws them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmray.builtin.charts import ChartDataset, ChartsConfig


def write_charts(path: Path, num_rows: int) -> str:
    """Write the first of the built-in charts as Parquet; return the path."""
    charts = ChartDataset(ChartsConfig(num_rows=num_rows), "test")
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in charts]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)
