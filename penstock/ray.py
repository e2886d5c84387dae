"""What Prefect has in a package of its own for Ray: ``from penstock.ray import RayTaskRunner, remote_options``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.engine.placement import remote_options
from penstock.runners import runner_class

if TYPE_CHECKING:
    from penstock.runners.ray import RayTaskRunner
else:  # without Ray a class that says which extra is missing, once somebody wants to make one
    RayTaskRunner = runner_class("RayTaskRunner")

__all__ = ["RayTaskRunner", "remote_options"]
