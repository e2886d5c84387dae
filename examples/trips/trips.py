"""Trips of taxis, a file per month: read a compressed CSV, give its columns their types, write Parquet."""

import sys
from pathlib import Path

import pandas as pd

from penstock import flow, task
from penstock.tasks import task_input_hash


@task(retries=3, cache_key_fn=task_input_hash)
def ingest_data(url: Path) -> pd.DataFrame:
    """Ingest the data"""
    df = pd.read_csv(url)
    return df


@task(log_prints=True)
def clean_it(df: pd.DataFrame) -> pd.DataFrame:
    """Clean the data"""
    df.tpep_pickup_datetime = pd.to_datetime(df.tpep_pickup_datetime)
    df.tpep_dropoff_datetime = pd.to_datetime(df.tpep_dropoff_datetime)

    print(df.head(2))
    print(f"columns: {df.dtypes}")
    print(f"rows: {len(df)}")

    return df


@task
def save_data_local(df: pd.DataFrame, path: Path) -> str:
    """Save the file locally"""
    local_file = f"{path}.parquet"
    df.to_parquet(local_file, compression="gzip")
    return local_file


@flow(name="Month of trips")
def month_flow(base: str, color: str, year: int, month: int, folder: str = "data") -> str:
    dataset_file = f"{color}_tripdata_{year}-{month:02}"
    dataset_url = f"{base}/{color}/{dataset_file}.csv.gz"

    raw_data = ingest_data(dataset_url)
    clean_data = clean_it(raw_data)
    path = save_data_local(clean_data, f"{folder}/{dataset_file}")
    return path


@flow(name="Months of trips")
def gather_flow(base: str, color: str, year: int, months: list[int], folder: str = "data") -> None:
    for month in months:
        month_flow(base, color, year, month, folder)


if __name__ == "__main__":
    Path("data").mkdir(exist_ok=True)
    gather_flow(sys.argv[1], "yellow", 2021, [1, 2, 3])
