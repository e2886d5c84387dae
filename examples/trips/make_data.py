"""Make three months of trips that nobody made: DIRECTORY/yellow/yellow_tripdata_2021-01.csv.gz and so on."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd


def make(directory: Path, year: int, month: int, rows: int = 1000, color: str = "yellow") -> Path:
    """Write one month and return its file."""
    random = np.random.default_rng(month)
    begin = pd.Timestamp(year, month, 1) + pd.to_timedelta(random.integers(0, 28 * 86400, rows), "s")
    frame = pd.DataFrame(
        {
            "VendorID": random.integers(1, 3, rows),
            "tpep_pickup_datetime": begin,
            "tpep_dropoff_datetime": begin + pd.to_timedelta(random.integers(60, 3600, rows), "s"),
            "trip_distance": random.gamma(2.0, 1.5, rows).round(2),
        }
    )
    path = directory / color / f"{color}_tripdata_{year}-{month:02}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    return path


if __name__ == "__main__":
    for number in (1, 2, 3):
        print(make(Path(sys.argv[1]), 2021, number))
