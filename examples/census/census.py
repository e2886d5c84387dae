"""A census as one large frame: are there people in it who are too old to be true?"""

import sys

import pandas as pd

from penstock import flow, get_run_logger, task


@task
def read_the_DataFrame(path_to_csv: str) -> pd.DataFrame:
    return pd.read_csv(path_to_csv)


@task
def get_average_age(df: pd.DataFrame) -> float:
    return df["Age"].mean()


@task
def count_wrong_values(df: pd.DataFrame):
    return df.loc[lambda x: x["Age"] > 120]["Age"].count()


@flow
def DataFrame_processing(path_to_csv: str):
    df = read_the_DataFrame(path_to_csv)
    avr_age = get_average_age(df)
    if avr_age > 120:
        # too many immortal people
        wrong_rows = count_wrong_values(df)
        get_run_logger().error(f"Wrong rows in the dataset based on the Age column: {wrong_rows}")
    return avr_age


@flow
def on_a_cluster(path_to_csv: str):
    """The same with futures: the frame is made on a worker and stays there."""
    df = read_the_DataFrame.submit(path_to_csv)
    avr_age, wrong_rows = get_average_age.submit(df), count_wrong_values.submit(df)
    if avr_age.result() > 120:
        get_run_logger().error(f"Wrong rows in the dataset based on the Age column: {wrong_rows.result()}")
    return avr_age, wrong_rows


if __name__ == "__main__":
    print(on_a_cluster(sys.argv[1]))
