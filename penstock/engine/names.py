"""Names for flow runs that nobody named: two words that people can say to each other."""

from __future__ import annotations

import random

_FIRST = ["amber", "ample", "bold", "brave", "bright", "brisk", "calm", "clear", "clever", "cosmic", "crisp", "daring", "deep", "eager", "early", "fair", "fleet", "gentle", "golden", "grand", "happy", "honest", "keen", "kind", "lively", "lucid", "lunar", "mellow", "merry", "mild", "misty", "nimble", "noble", "patient", "placid", "polar", "proud", "quick", "quiet", "rapid", "robust", "royal", "serene", "sharp", "silent", "silver", "sleek", "smooth", "snowy", "solar", "solid", "spry", "stellar", "still", "sunny", "swift", "tidal", "vivid", "warm", "wise", "witty", "zesty"]
_SECOND = ["albatross", "antares", "badger", "beaver", "bison", "bittern", "brook", "buzzard", "canyon", "cedar", "comet", "condor", "coral", "crane", "curlew", "delta", "dipper", "dolphin", "dune", "eagle", "egret", "falcon", "fjord", "fox", "gannet", "glacier", "grebe", "harrier", "heron", "ibis", "kestrel", "lark", "lynx", "marten", "meadow", "merlin", "nebula", "newt", "orca", "osprey", "otter", "owl", "petrel", "plover", "pulsar", "quasar", "raven", "reef", "robin", "salmon", "seal", "sirius", "stork", "swan", "swift", "tern", "thrush", "vega", "walrus", "wren"]

_source = random.SystemRandom()


def new_name() -> str:
    """Make a name such as ``"bold-heron"``; names need not be unique, ids are."""
    return f"{_source.choice(_FIRST)}-{_source.choice(_SECOND)}"
