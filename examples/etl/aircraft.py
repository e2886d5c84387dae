"""Aircraft near an airport: extract two sources, transform one with the other, load both."""

import json
import sys
from pathlib import Path

import requests

from penstock import flow, task

AIRPORT = (38.95, -77.45)  # latitude and longitude in degrees
AROUND = 2.0  # degrees


@task(retries=2)
def extract_reference_data(base):
    print("fetching reference data...")
    return requests.get(f"{base}/reference.json", timeout=10).json()


@task(retries=2)
def extract_live_data(base):
    # Get the live aircraft vector data around the airport
    print("fetching live data...")
    vectors = requests.get(f"{base}/live.json", timeout=10).json()
    return [
        one
        for one in vectors
        if abs(one["lat"] - AIRPORT[0]) < AROUND and abs(one["long"] - AIRPORT[1]) < AROUND
    ]


@task
def transform(live_data, reference_data):
    return [{**one, "airline": reference_data.get(one["callsign"][:3], "?")} for one in live_data]


@task
def load_reference_data(reference_data, folder):
    Path(folder, "airlines.json").write_text(json.dumps(reference_data))


@task
def load_live_data(live_data, folder):
    Path(folder, "aircraft.json").write_text(json.dumps(live_data))


@flow(name="etl")
def etl(base: str, folder: str = "."):
    reference_data = extract_reference_data.submit(base)
    live_data = extract_live_data.submit(base)

    transformed_live_data = transform.submit(live_data, reference_data)

    load_reference_data.submit(reference_data, folder)
    load_live_data.submit(transformed_live_data, folder)


if __name__ == "__main__":
    etl(sys.argv[1])
