"""Settings that cannot work are refused when they are made, with both values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_server.errors import ConfigurationError
from semid_server.serving.config import MESSAGE_OVERHEAD, ModelSource, ServeConfig


def config(**settings):
    return ServeConfig(models=(ModelSource(Path("x")),), **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"port": 65536}, "port is 65536; expected 0 to 65535"),
        ({"metrics_port": -1}, "metrics_port is -1"),
        ({"max_batch_rows": 0}, "max_batch_rows is 0; expected at least 1"),
        ({"max_message_bytes": 100}, "max_message_bytes is 100; expected more than"),
        (
            {"max_message_bytes": 1 << 32},
            "max_message_bytes is 4294967296; expected 1 to 2147483647",
        ),
        ({"max_connection_streams": 1 << 31}, "max_connection_streams is 2147483648"),
        ({"max_batch_seconds": math.nan}, "max_batch_seconds is nan; expected at least 0.0001"),
        ({"max_batch_bytes": 1 << 20}, "max_batch_bytes is 1048576, less than max_message_bytes"),
        ({"threads": 0}, r"threads is 0; expected 1 to \d+ \(8 for each processor at most\)"),
        ({"processes": 100_000}, r"processes is 100000; expected 1 to \d+ \(8 for each"),
        ({"verify_fraction": 1.5}, "verify_fraction is 1.5; expected 0 to 1"),
        ({"watch": -1}, "watch is -1; expected at least 0 seconds"),
        ({"grace": -1}, "grace is -1; expected at least 0 seconds"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, text):
    with pytest.raises(ConfigurationError, match=text):
        config(**settings)


@settings(deadline=None)
@given(input_dim=st.integers(1, 100_000), message=st.integers(MESSAGE_OVERHEAD + 1, 1 << 26))
def test_the_rows_of_a_request_fit_a_batch_and_their_decoding_one_message(input_dim, message):
    made = config(max_message_bytes=message, max_batch_bytes=1 << 26)
    if 4 * input_dim + MESSAGE_OVERHEAD > message:
        with pytest.raises(ConfigurationError, match=f"takes {4 * input_dim} bytes"):
            made.max_rows(input_dim)
        return
    rows = made.max_rows(input_dim)
    assert 1 <= rows <= made.max_batch_rows
    assert rows * 4 * input_dim + MESSAGE_OVERHEAD <= message
