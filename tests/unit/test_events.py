"""Events: their bytes, their ids, the bus."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.events import Bus, Event, element_id, new_id, pack, unpack

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
counts = st.integers(0, 1 << 31)


@given(st.text(max_size=9), st.dictionaries(st.text(max_size=9), values, max_size=4), counts, counts, counts)
def test_an_event_survives_being_packed(kind: str, body: dict, epoch: int, attempt: int, rseq: int) -> None:
    event = Event(kind, "a" * 32, "b" * 32, 1.5, body, epoch, attempt, 2, rseq)
    assert unpack(pack(event)) == event


def test_what_a_newer_writer_appends_is_ignored() -> None:
    data = pack(Event("state", "a", "b", 1.0))
    assert data[0] == 0x99  # a list of nine
    assert unpack(b"\x9a" + data[1:] + b"\x01") == Event("state", "a", "b", 1.0)


def test_ids_are_uuids_in_the_order_of_time() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(uuid.UUID(one).version == 7 for one in ids)
    assert [one[:12] for one in ids] == sorted(one[:12] for one in ids)


@given(st.integers(0, (1 << 28) - 1), st.integers(0, (1 << 28) - 1))
def test_the_ids_of_elements_follow_from_the_map(first: int, second: int) -> None:
    map_id = "0190a3c4d5e67abc8def0123456789ab"
    one, other = element_id(map_id, first), element_id(map_id, second)
    assert (one == other) == (first == second)
    assert uuid.UUID(one).version == 8
    assert uuid.UUID(one).variant == uuid.RFC_4122
    assert one[:12] == map_id[:12]


def test_the_id_of_an_element_is_for_ever() -> None:
    # Stored runs are found by it: a change of the formula would orphan them.
    assert element_id("0190a3c4d5e67abc8def0123456789ab", 7) == "0190a3c4d5e6880aa00000076b43a8f6"


def test_the_bus_hands_events_to_subscribers_in_order() -> None:
    bus, seen = Bus(), []
    end = bus.subscribe(lambda event: seen.append(event.kind))
    for kind in "abc":
        bus.publish(Event(kind, "", "", 0.0))
    end()
    bus.publish(Event("d", "", "", 0.0))
    assert seen == ["a", "b", "c"]


def test_events_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Event("a", "", "", 0.0).kind = "b"  # type: ignore[misc]
