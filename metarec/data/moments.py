"""What timestamps say of a moment: its hour, weekday and month, in UTC."""

from __future__ import annotations

import numpy as np
import pandas as pd

from metarec.data.side import Texts
from metarec.data.source_options import OF_TIME

# How pandas calls them.
_OF_TIME = dict(zip(OF_TIME, ("hour", "day_name", "month_name"), strict=True))


def without_times(name: str) -> tuple[str, str]:
    """Returns what is wrong where there are no times to read a moment off, and the cure."""
    return (
        f"'{name}' is read off timestamps, and the ratings have none",
        f"Name their column of times (--column timestamp=THEIRS), or one '{name}'",
    )


def moments_of(times: np.ndarray, name: str) -> Texts:
    """Returns what times say of each moment, "" where there is no time, shape (times,).

    Args:
        times: Seconds since 1970, NaN where there is none.
        name: One of `OF_TIME`.
    """
    read = pd.to_datetime(pd.Series(times, dtype=np.float64), unit="s", utc=True, errors="coerce").dt
    found = getattr(read, _OF_TIME[name])
    values = found() if callable(found) else found.astype("Int64")
    texts: Texts = np.array(["" if pd.isna(value) else str(value) for value in values], object)
    return texts
