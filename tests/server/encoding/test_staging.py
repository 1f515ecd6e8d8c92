"""Batches on the host are cut into pieces, all of them sent and worked on once and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from semid_server.encoding.staging import convey, pieces


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 900))
def test_pieces_cover_every_row_once_and_none_is_larger_than_allowed(total, least, most):
    parts = pieces(total, least=least, most=most)
    ends = [0, *(stop for _, stop in parts)]
    assert ends == [start for start, _ in parts] + [total]
    assert all(0 < stop - start <= most for start, stop in parts)


def test_the_first_and_the_last_piece_are_small():
    sizes = [stop - start for start, stop in pieces(1000, least=10, most=100)]
    assert sizes[:4] == [10, 20, 40, 80]
    assert sizes[-4:] == [80, 40, 20, 10]
    assert max(sizes) == 100


@given(st.integers(0, 12), st.integers(0, 4))
def test_a_piece_is_sent_before_it_is_worked_on_and_never_more_than_asked_ahead(count, ahead):
    parts = [(i, i + 1) for i in range(count)]
    told = []
    convey(
        parts,
        ahead=ahead,
        send=lambda i, start, stop: told.append(("send", i, start, stop)),
        work=lambda i, start, stop: told.append(("work", i, start, stop)),
    )
    for name in ("send", "work"):
        assert [item[1:] for item in told if item[0] == name] == [
            (i, i, i + 1) for i in range(count)
        ]
    waiting = 0
    for name, *_ in told:
        waiting += 1 if name == "send" else -1
        assert 0 <= waiting <= ahead + 1
