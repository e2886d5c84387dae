"""Where tests leave what they have measured: in the folder that ``PENSTOCK_TEST_FIGURES`` names."""

import json
import os
import time
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("PENSTOCK_TEST_FIGURES", "")  # now: tests run without settings from outside


def keep(name: str, figures: dict[str, Any]) -> None:
    """Write the figures of one test; without the setting they are only printed."""
    told = {"case": name, "time": time.strftime("%Y-%m-%d %H:%M"), "load": os.getloadavg()[0], **figures}
    print(json.dumps(told))
    if FOLDER:
        path = Path(FOLDER)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
