"""Reduce a radio observation: the demo of penstock, run as your own script would run it.

python examples/radio/reduce.py                    threads, the copy of the data in the package
PENSTOCK_RUNNER=dask python examples/radio/reduce.py
"""

from penstock.demo import radio

if __name__ == "__main__":
    print(radio())
