"""Write a file, check it, and leave nothing behind if the check fails."""

import os

from penstock import flow, task
from penstock.transactions import transaction


@task
def write_file(contents):
    with open("side-effect.txt", "w") as file:
        file.write(contents)


@write_file.on_rollback
def delete_file(txn):
    os.unlink("side-effect.txt")
    print(f"{txn.get('who')}: the file is gone again")


@task
def quality_test():
    with open("side-effect.txt") as file:
        contents = file.read()
    if len(contents) < 20:
        raise ValueError(f"{contents!r} is too short")


@flow
def pipeline(contents):
    with transaction() as txn:
        txn.set("who", "pipeline")
        write_file(contents)
        quality_test()


if __name__ == "__main__":
    pipeline("a file with enough in it")
    print(os.path.exists("side-effect.txt"))
    try:
        pipeline("half-written")
    except ValueError as error:
        print(error)
    print(os.path.exists("side-effect.txt"))
