"""Make a census of people who never lived, with the columns of a real one: FILE MEGABYTES."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROWS = 200_000  # drawn once and written until the file is large enough


def make(path: Path, nbytes: int) -> int:
    """Write about so many bytes; return the number of rows."""
    random = np.random.default_rng(2018)
    frame = pd.DataFrame(
        {
            "Year": random.choice([2006, 2013, 2018], ROWS),
            "Age": random.choice(
                [*range(100), 999_999], ROWS
            ),  # 999999 stands for a total, and ruins the mean
            "Ethnic": random.integers(1, 10, ROWS),
            "Sex": random.integers(1, 4, ROWS),
            "Area": random.integers(100_000, 400_000, ROWS),
            "count": random.integers(0, 5000, ROWS),
        }
    )
    block = frame.to_csv(index=False, header=False)
    rows = max(1, min(ROWS, nbytes * ROWS // len(block)))
    block = "".join(block.splitlines(keepends=True)[:rows])
    blocks = max(1, nbytes // len(block))
    with path.open("w") as file:
        file.write(",".join(frame.columns) + "\n")
        for _ in range(blocks):
            file.write(block)
    return rows * blocks


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), int(float(sys.argv[2]) * 1e6)), "rows")
