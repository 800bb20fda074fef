"""Arrow tables as columns of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from metarec.data.sources.texts import as_text
from metarec.errors import DataError, suggest


def checked(table: pa.Table) -> pa.Table:
    """Returns a table once every offset, length and text of it has been looked at; Arrow trusts them afterwards.

    Raises:
        pyarrow.ArrowInvalid: One of them is impossible.
    """
    table.validate(full=True)
    return table


def parquet_table(content: bytes, where: str) -> pa.Table:
    """Reads Parquet, with the checksums of its pages where it has any.

    Raises:
        DataError: It is damaged, or no Parquet.
    """
    try:
        return checked(pq.read_table(pa.BufferReader(content), page_checksum_verification=True))
    except (OSError, ValueError, KeyError, TypeError, MemoryError, pa.ArrowException) as error:
        raise DataError(f"{where} is not Parquet: {error}", "Check the file") from None


def arrow_columns(table: pa.Table, wanted: Mapping[str, str], where: str, optional: Sequence[str] = ()) -> pd.DataFrame:
    """Takes columns of an Arrow table as text; nulls become empty texts.

    Raises:
        DataError: A column is missing.
    """
    missing = [name for name in wanted if name not in table.column_names and name not in optional]
    if missing:
        raise DataError(f"{where} has no column '{missing[0]}'", suggest(missing[0], table.column_names))
    return pd.DataFrame(
        {here: _text_column(table.column(name)) for name, here in wanted.items() if name in table.column_names}
    )


def _text_column(column: pa.ChunkedArray) -> pd.Series:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_struct(column.type):
        return pd.Series([as_text(value) for value in column.to_pylist()], dtype=str)
    if pa.types.is_floating(column.type):
        return pd.Series(column.to_numpy())
    if pa.types.is_timestamp(column.type):
        exact = column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64())
        return pd.Series(exact.cast(pa.float64(), safe=False).to_numpy() / 1e6)
    text = column.cast(pa.string()).fill_null("").dictionary_encode().unify_dictionaries()
    frame: pd.DataFrame = pa.table({"text": text}).to_pandas()
    return frame["text"]
