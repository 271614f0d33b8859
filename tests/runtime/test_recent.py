"""What was made last is kept, within a number of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.runtime.recent import Recent


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 14)), min_size=1), st.booleans())
def test_the_last_are_held_within_the_limit(asked: list[tuple[int, int]], last: bool) -> None:
    """Against a list in the order of use."""
    recent: Recent[int, bytes] = Recent(12, len, last)
    used: list[tuple[int, bytes]] = []
    for key, size in asked:
        expected = next((value for known, value in used if known == key), None)
        assert recent.get(key) == expected
        value = bytes(size) if expected is None else expected
        used = [(known, held) for known, held in used if known != key]
        if expected is None:
            assert recent.put(key, value) is value
        used.append((key, value))
        while expected is None and sum(len(held) for _, held in used) > 12 and len(used) > last:
            used.pop(0)


def test_a_result_is_made_once_while_it_is_held() -> None:
    recent: Recent[str, bytes] = Recent(3, len)
    made: list[str] = []

    def make() -> bytes:
        made.append("again")
        return b"ab"

    assert recent.once("a", make) is recent.once("a", make)
    assert len(made) == 1
    recent.once("b", make)
    recent.once("a", make)
    assert len(made) == 3


def test_what_is_dropped_is_read_again() -> None:
    recent: Recent[str, bytes] = Recent(3, len, last=False, on_disk=1 << 20)
    recent.put("large", b"larger than the limit")
    for key in ("a", "b", "c"):
        recent.put(key, key.encode() * 2)
    assert recent.get("large") == b"larger than the limit"
    assert [recent.get(key) for key in ("a", "b", "c")] == [b"aa", b"bb", b"cc"]
    assert recent.get("d") is None


def test_what_takes_the_place_of_a_result_takes_it_on_disk_too() -> None:
    recent: Recent[str, bytes] = Recent(3, len, on_disk=1 << 20)
    for value in (b"old", b"new"):
        recent.put("a", value)
        recent.put("b", b"xyz")
    assert recent.get("a") == b"new"
