"""Where results are stored, and how they are read again: under Prefect's name for the module."""

from penstock.engine.result_records import ResultRecord, ResultStore
from penstock.engine.results import ResultStorage, load_result

__all__ = ["ResultRecord", "ResultStorage", "ResultStore", "load_result"]
