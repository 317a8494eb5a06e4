"""The records of the exchange: written and read back, checked field by field, never trusted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from fedsplit.errors import RecordError, SchemaError
from fedsplit.exchange.records import (
    RECORD_BYTES,
    SCHEMA,
    FinishedRecord,
    PayloadRecord,
    Request,
    ResultRecord,
    TaskRecord,
    decode,
    encode,
    parse,
    read,
    scalars,
)  # fmt: skip
from tests.bounds import BOUND_S

DIGEST = "0123456789abcdef" * 4
REQUEST = Request(
    run_id="r", kind="train", server_round=2, total_rounds=5, config={"a": True, "b": 2, "c": 0.1, "d": "x"},
    split=(("head.*", True), ("*", False)),
)  # fmt: skip
TASK = TaskRecord(**vars(REQUEST), version=7, payload=PayloadRecord(file="task-7.safetensors", bytes=80, digest=DIGEST))
RESULT = ResultRecord(
    version=7, run_id="r", kind="train", server_round=2, status="ok", num_examples=3, loss=0.25, seconds=1.5,
    payload=PayloadRecord(file="result-7.safetensors", bytes=80, digest=DIGEST), metrics={"acc": 0.5, "n": 3},
)  # fmt: skip
FAILED = ResultRecord(
    version=7, run_id="r", kind="train", server_round=2, status="error",
    error={"type": "ValueError", "message": "no", "traceback": "…"},
)  # fmt: skip
FINISHED = FinishedRecord(version=8, run_id="r", outcome="stopped", reason="Ctrl-C")
RECORDS = {"task": TASK, "result": RESULT, "failed": FAILED, "finished": FINISHED}


def written(record: Any) -> dict[str, Any]:
    return parse(encode(record, "there"), "here")


def changed(record: Any, key: str, value: Any) -> Any:
    """Read a record back with one key changed; a dot leads into an inner object; ``...`` takes the key out."""
    fields = written(record)
    *path, last = key.split(".")
    inner = fields
    for name in path:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return read(fields, type(record), "here")


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_is_read_back_as_it_was_written(record):
    fields = written(record)
    assert fields["schema"] == SCHEMA
    assert read(fields, type(record), "here") == record
    assert decode(encode(record, "there"), type(record), "here") == record


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_keys_that_are_not_known_are_ignored(record):
    assert changed(record, "of_a_newer_version", [{"a": None}]) == record


def test_the_records_have_the_keys_that_the_design_promises():
    task = {"schema", "run_id", "version", "kind", "server_round", "total_rounds", "config", "payload"}
    result = (task - {"total_rounds", "config"}) | {"status", "num_examples", "loss", "metrics", "error"}
    assert task <= written(TASK).keys() and result <= written(RESULT).keys()
    assert {"file", "bytes"} <= written(TASK)["payload"].keys()
    assert written(FAILED)["error"].keys() == {"type", "message", "traceback"}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_numbers_that_json_has_no_word_for_survive(record):
    if isinstance(record, ResultRecord):
        assert math.isnan(changed(record, "loss", math.nan).loss)
        assert changed(record, "loss", math.inf).loss == math.inf


WRONG: list[tuple[str, str, Any]] = [
    (name, "version", value) for name in RECORDS for value in (..., 0, -1, True, 1.0, "7", None, 2**63, 10**4000)
] + [
    (name, "kind", value) for name in ("task", "result") for value in (..., "test", "", None, 3, ["train"])
] + [
    (name, "server_round", value) for name in ("task", "result") for value in (..., -1, 1.5, True, None, "1", 2**63)
] + [
    (name, "run_id", value) for name in RECORDS for value in (..., None, 3, ["r"])
] + [
    ("task", "total_rounds", value) for value in (..., -1, None, "5")
] + [
    ("task", "config", value) for value in (None, [], "x", {"a": None}, {"a": [1]}, {"a": {}})
] + [
    ("task", "split", value) for value in (None, {}, "x", [["a"]], [["a", 1]], [[1, True]], ["ab"], [["a", True, 2]])
] + [
    ("task", "cancelled", value) for value in (None, 0, 1, "true")
] + [
    ("result", "status", value) for value in (..., "done", None, True)
] + [
    ("result", "num_examples", value) for value in (None, -1, 1.0, True, "3", 2**64)
] + [
    ("result", "loss", value) for value in ("0.1", True, [], 10**400)
] + [
    ("result", "seconds", value) for value in (None, "1", True, 10**400)
] + [
    ("result", "metrics", value) for value in (None, [], {"a": None}, {"a": []})
] + [
    ("failed", "error", value) for value in ("no", [], {"type": 3}, {"message": None}, {"traceback": ["…"]})
] + [
    (name, "payload", value) for name in ("task", "result") for value in ("x", [], 3, {}, True)
] + [
    (name, "payload.bytes", value) for name in ("task", "result") for value in (..., 0, 7, -1, "80", 80.0, True, 2**64)
] + [
    (name, "payload.digest", value)
    for name in ("task", "result") for value in (..., "", DIGEST[:-1], DIGEST.upper(), "g" * 64, None, DIGEST + "\n")
] + [
    ("task", "payload.file", value)
    for value in (..., None, "result-7.safetensors", "task-6.safetensors", "../task-7.safetensors")
] + [
    ("result", "payload.file", value)
    for value in (..., None, "task-7.safetensors", "result-70.safetensors", "/result-7.safetensors")
] + [
    ("finished", "outcome", None), ("finished", "reason", 3)
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), WRONG, ids=[f"{n}-{k}-{str(v)[:20]}" for n, k, v in WRONG])
def test_a_field_of_the_wrong_kind_is_a_record_error_that_names_place_and_key(name, key, value):
    with pytest.raises(RecordError) as caught:
        changed(RECORDS[name], key, value)
    message = str(caught.value)
    assert message.startswith("here") and (key.split(".")[0] in message or "payload" in message)


@pytest.mark.parametrize(
    ("name", "key", "default"),
    [
        ("task", "config", {}), ("task", "split", ()), ("task", "cancelled", False), ("task", "payload", None),
        ("result", "num_examples", 0), ("result", "loss", None), ("result", "metrics", {}), ("result", "seconds", 0.0),
        ("failed", "error", None), ("finished", "outcome", "complete"), ("finished", "reason", ""),
    ],
)  # fmt: skip
def test_what_another_program_may_leave_out_has_a_default(name, key, default):
    found = changed(RECORDS[name], key, ...)
    assert getattr(found, key) == default


@pytest.mark.parametrize("schema", ["fedsplit/2", "fedsplit/0", "other", None, 1, []])
def test_another_schema_is_refused_naming_both(schema):
    with pytest.raises(SchemaError, match=r"here has schema .*, this version of fedsplit reads 'fedsplit/1'"):
        parse(json.dumps({"schema": schema}).encode(), "here")


def test_a_record_without_a_schema_is_refused():
    with pytest.raises(SchemaError, match="schema None"):
        parse(b"{}", "here")


@pytest.mark.parametrize(
    "text",
    [b"", b" ", b"{", b'{"a": }', b"\xff", b"{}{}", '{"schema": ""}'.encode("utf-16"), b"[" * 200_000, b"9" * 5000],
    ids=["empty", "blank", "torn", "value", "not UTF-8", "two", "UTF-16", "deep", "long number"],
)  # fmt: skip
def test_what_is_not_json_is_a_record_error(text):
    with pytest.raises(RecordError, match="here is not JSON"):
        parse(text, "here")


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b'"x"', b"true"])
def test_what_is_no_object_is_a_record_error(text):
    with pytest.raises(RecordError, match="expected an object"):
        parse(text, "here")


def test_a_request_of_the_server_is_checked_like_one_of_a_file():
    fields = {"run_id": "r", "kind": "train", "server_round": 2, "total_rounds": 5}
    assert read(fields, Request, "the server's request").split == ()
    with pytest.raises(RecordError, match=r"the server's request: kind: .*initialize"):
        read(fields | {"kind": "x"}, Request, "the server's request")


def test_metrics_hold_only_what_json_and_flower_can_carry():
    assert scalars({"a": True, "b": 1, "c": 1.5, "d": "x"}, "metrics") == {"a": True, "b": 1, "c": 1.5, "d": "x"}
    for value in (None, [1], {}, b"x", 1j):
        with pytest.raises(RecordError, match="metrics: 'a' is a"):
            scalars({"a": value}, "metrics")
    with pytest.raises(RecordError, match="3 is a"):
        scalars({3: "x"}, "metrics")  # type: ignore[dict-item]


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400])
def test_a_number_beyond_64_bits_is_no_metric_for_a_writer_nor_for_a_reader(number):
    with pytest.raises(RecordError, match="metrics: 'big' cannot be sent: Expected `int`"):
        scalars({"big": number}, "metrics")
    with pytest.raises(RecordError, match="here: metrics"):
        changed(RESULT, "metrics", {"big": number})


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_examples", -1), ("num_examples", 2**63), ("metrics", {"a": None}), ("error", {"type": 3}), ("status", "?")],
)
def test_a_writer_refuses_what_a_reader_would_refuse(field, value):
    with pytest.raises(RecordError, match=rf"there: {field}"):
        encode(replace(RESULT, **{field: value}), "there")


def test_a_writer_refuses_a_record_that_a_reader_would_not_read_to_its_end():
    with pytest.raises(RecordError, match=r"there would have 5,000,\d+ bytes, at most 4,000,000"):
        encode(replace(RESULT, error={"message": "x" * 5_000_000}), "there")
    almost = replace(RESULT, error={"message": "x" * (RECORD_BYTES - 1000)})
    assert decode(encode(almost, "there"), ResultRecord, "here") == almost


@pytest.mark.parametrize(("metrics", "says"), [
    ({"a": "x" * 10_001}, "'a' cannot be sent: Expected `str` of length <= 10000"),
    ({"n" * 201: 1}, "has 201 characters, at most 200 are allowed"),
    ({str(number): number for number in range(1_001)}, "1,001 are given, at most 1,000 are allowed"),
])  # fmt: skip
def test_metrics_have_limits_that_a_trainer_meets_at_once(metrics, says):
    with pytest.raises(RecordError, match=says):
        scalars(metrics, "metrics")
    with pytest.raises(RecordError, match="metrics"):
        encode(replace(RESULT, metrics=metrics), "there")


def test_what_a_message_quotes_is_cut_and_escaped():
    with pytest.raises(RecordError) as caught:
        decode(json.dumps({"schema": "\x1b[2J" + "x" * 10_000}).encode(), ResultRecord, "here")
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_scalars_of_other_types_become_plain_ones():
    import numpy as np

    found = scalars({"a": np.float64(0.5), "b": np.str_("x")}, "metrics")
    assert [type(value) for value in found.values()] == [float, str]


def test_threads_that_are_the_first_to_read_a_kind_of_record_do_not_end_the_process() -> None:
    # In a process of its own: it was a segmentation fault. New types, so that each is looked at for the first time.
    code = """
import sys, threading
from dataclasses import make_dataclass
from fedsplit.exchange.records import read
sys.setswitchinterval(1e-6)
for _ in range(100):
    inner = make_dataclass("Inner", [("a", int), ("b", str)], kw_only=True)
    outer = make_dataclass("Outer", [("c", inner), ("d", inner | None)], kw_only=True)
    together = threading.Barrier(8)
    def reads():
        together.wait()
        fields = {"a": 1, "b": "x"}
        read({"c": fields, "d": fields}, outer, "here")
    threads = [threading.Thread(target=reads) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=BOUND_S, check=False).returncode == 0
