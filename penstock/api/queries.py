"""The read side: what happened, as dictionaries that can be written as JSON.

Every function takes a connection from `penstock.api.embedded.reading`. Times are seconds since
1970, durations seconds; what is unknown is None.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from penstock.api.models import ACCEPTED, STALE, UNREADABLE, events, flow_runs, maps, task_runs
from penstock.engine.events import Event, unpack

__all__ = ["ANSWERS", "find_runs", "get_history", "get_logs", "get_run", "get_tree", "list_runs"]

Found = dict[str, Any]

FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED", "SKIPPED"})
_JSON = ("tags", "parameters", "upstream", "upstream_maps", "backend")
_INTERNAL = ("made", "backend_order", "epoch", "rank", "rseq", "error_type", "error_message", "error_text")
