"""The table from errors to statuses is complete, and what it sends fits the wire."""

from __future__ import annotations

import inspect

import grpc
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from semid_server import errors
from semid_server.errors import FieldViolation, InvalidInputError, OverloadedError
from semid_server.serving.status import (
    CODES,
    DETAILS_KEY,
    MAX_VIOLATIONS,
    code_of_cancelled,
    status_of,
)

ALL_ERRORS = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, errors.SemidError)
]


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda error: error.__name__)
def test_every_error_that_can_be_raised_has_a_status(error):
    if error is not errors.SemidError:  # the base is never raised itself
        assert error in CODES


def test_the_tree_in_the_docstring_names_every_error():
    for error in ALL_ERRORS:
        assert error.__name__ in errors.__doc__


def test_details_fit_the_trailers_however_much_is_wrong():
    violations = [FieldViolation(f"embeddings[{row}]", "é" * 5000) for row in range(10_000)]
    status = status_of(InvalidInputError("é" * 100_000, violations))
    packed = dict(status.trailing_metadata)[DETAILS_KEY]
    # The message percent-encoded and the details in base64, beside each other.
    assert 3 * len(status.message.encode()) + 4 * len(packed) / 3 < 8192
    assert len(status_pb2.Status.FromString(packed).details) == 1


def test_no_more_violations_are_sent_than_the_limit():
    violations = [FieldViolation(f"embeddings[{row}]", "is bad") for row in range(100)]
    packed = dict(status_of(InvalidInputError("bad", violations)).trailing_metadata)[DETAILS_KEY]
    assert packed.count(b"is bad") == MAX_VIOLATIONS


def test_what_a_checkpoint_error_says_stays_in_the_log():
    status = status_of(errors.MalformedCheckpointError("/secret/path", "is cut short"))
    assert status.code == grpc.StatusCode.INTERNAL
    assert "secret" not in status.message


def test_an_overload_carries_its_hint_twice():
    status = status_of(OverloadedError("full", retry_after=1.5))
    metadata = dict(status.trailing_metadata)
    assert metadata["grpc-retry-pushback-ms"] == "1500"
    assert DETAILS_KEY in metadata


def test_a_message_that_is_too_large_is_not_to_be_sent_again():
    status = status_of(errors.MessageTooLargeError("20000 rows in one request"))
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(status.trailing_metadata) == {"grpc-retry-pushback-ms": "-1"}


@given(timeout=st.floats(0.01, 1e6), rounded_up=st.floats(0, 0.01))
def test_a_caller_who_left_at_its_deadline_ran_out_of_time(timeout, rounded_up):
    code = code_of_cancelled(timeout, rounded_up * timeout)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED


@given(timeout=st.floats(0.01, 1e6), share=st.floats(0, 0.95))
def test_a_caller_who_left_before_its_deadline_left_by_choice(timeout, share):
    code = code_of_cancelled(share * timeout, (1 - share) * timeout)
    assert code is grpc.StatusCode.CANCELLED


def test_a_caller_without_a_deadline_left_by_choice():
    assert code_of_cancelled(1e6, None) is grpc.StatusCode.CANCELLED
