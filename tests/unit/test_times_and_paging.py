"""Times as text, and the keys and limits of pages."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.common.paging import MAX_LIMIT, KeyNames, make_key, parse_key, parse_limit
from services.common.times import parse_time, time_text

NAMES = KeyNames("InferenceJobId", "createTime")
ROW = UUID("8c2ee8c5-7a4e-4c0b-a1c4-2f0d3a3f0f5e")


def test_a_time_of_any_zone_is_told_in_utc_with_six_digits() -> None:
    time = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert time_text(time) == "2025-12-31 23:30:00.000000"
    assert parse_time("2025-12-31 23:30:00.000000") == time
    assert time_text(None) is None


def test_a_key_leads_back_to_its_row_and_tells_its_fields() -> None:
    time = datetime(2026, 1, 1, 1, 30, 0, 7, tzinfo=UTC)
    key = make_key(NAMES, ROW, time, taskType="txt2img")
    assert parse_key(NAMES, key) == (time, ROW)
    assert json.loads(base64.urlsafe_b64decode(key)) == {
        "InferenceJobId": str(ROW),
        "taskType": "txt2img",
        "createTime": "2026-01-01 01:30:00.000007",
    }
    assert parse_key(NAMES, "") is None


@pytest.mark.parametrize("fields", [b"{}", b"[]", b"7", b'{"createTime": 7}', b'{"createTime": "today"}', b"{"])
def test_what_is_no_key_is_refused(fields: bytes) -> None:
    key = base64.urlsafe_b64encode(fields).decode()
    with pytest.raises(InvalidArgument, match=f'exclusive_start_key "{key}" is malformed'):
        parse_key(NAMES, key)


@pytest.mark.parametrize("key", ["!", "é", "e30"])
def test_what_is_no_base64_is_no_key(key: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_key(NAMES, key)


def test_an_id_that_is_no_text_is_no_key() -> None:
    fields = {"createTime": "2026-01-01 01:30:00.000007", "InferenceJobId": 7}
    with pytest.raises(InvalidArgument):
        parse_key(NAMES, base64.urlsafe_b64encode(json.dumps(fields).encode()).decode())


@pytest.mark.parametrize(
    ("text", "expected"), [("", 10), ("3", 3), ("0", MAX_LIMIT), ("-1", MAX_LIMIT), ("99999", MAX_LIMIT)]
)
def test_a_limit_is_ten_by_default_and_none_is_larger_than_a_page_can_be(text: str, expected: int) -> None:
    assert parse_limit(text) == expected


def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidArgument, match='limit "few" is not a number'):
        parse_limit("few")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([NAMES.id, NAMES.time]) | st.text(), inner)
    ),
    max_leaves=5,
)


@given(st.uuids(), st.datetimes(datetime(2000, 1, 1), timezones=st.just(UTC)))
def test_any_row_has_a_key_that_leads_back_to_it(row_id: UUID, time: datetime) -> None:
    assert parse_key(NAMES, make_key(NAMES, row_id, time)) == (time, row_id)


@given(JSON.map(lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode()) | st.text(min_size=1))
def test_any_text_is_a_key_or_refused(key: str) -> None:
    try:
        time, row_id = parse_key(NAMES, key) or (None, None)
    except InvalidArgument:
        return
    assert isinstance(time, datetime)
    assert isinstance(row_id, UUID)
