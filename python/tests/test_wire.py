"""The handshake: the bytes of the examples in docs/wire-protocol.md, and answers that are not replies."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from ingestd import Difference, FormatError, Refused, Spec
from ingestd.wire import encode_hello, hello, parse_notice, parse_reply

DOCS = Path(__file__).resolve().parents[2] / "docs" / "wire-protocol.md"


def example(name: str) -> bytes:
    """The bytes of a block ```hex NAME``` or ```hexdump NAME``` of the protocol's documentation."""
    found = re.search(rf"```hex(?:dump)? {name}\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found, f"{DOCS} has no example {name!r}"
    data = bytearray()
    for line in found[1].splitlines():
        data += bytes.fromhex(line[6:].split("|")[0])
    return bytes(data)


def test_fingerprint_of_the_documentation() -> None:
    assert Spec.parse("image:F32[8,8],label:I32").fingerprint == example("fingerprint").hex()


def test_hello_of_the_documentation() -> None:
    spec = Spec.parse("image:F32[8,8],label:I32")
    body = hello(
        "push", "digits", spec, session="worker-1", ack="queued", window_bytes=1 << 20, client="example/1.0"
    )  # fmt: skip
    assert body.pop("fingerprint") == spec.fingerprint  # the example leaves it out
    assert encode_hello(body) == example("hello")


def test_replies_of_the_documentation() -> None:
    reply = parse_reply(example("accepted"))
    assert reply.version == 1
    assert reply.body["fingerprint"] == example("fingerprint").hex()
    assert reply.integer("window_bytes") == 1 << 20 and reply.integer("held") == 0
    with pytest.raises(Refused) as refused:
        parse_reply(example("refusal"))
    assert refused.value.code == "spec_mismatch"
    assert refused.value.diff == [Difference("label", "I64", "I32")]
    assert refused.value.spec is not None
    assert Spec.parse(refused.value.spec) == Spec.parse("image:F32[8,8],label:I32")
    assert "send samples of the table's spec" in str(refused.value)
    assert "leaf 'label': got I64, want I32" in str(refused.value)


def test_notice_of_the_documentation() -> None:
    data = example("notice")
    assert data[:4] == b"\1\1\1\0"
    assert parse_notice(data[8:]) == ("shutting_down", "the daemon is stopping; connect again later")


def test_every_option_of_a_hello() -> None:
    spec = Spec.parse("a:U8")
    assert hello("train", "t", None, prefetch=3, client="c") == {
        "role": "train", "table": "t", "byte_order": "little", "prefetch": 3, "client": "c",
    }  # fmt: skip
    body = hello("push", "täble", spec, session=None, window_samples=0)
    assert list(body) == ["role", "table", "byte_order", "spec", "fingerprint"]
    assert json.loads(encode_hello(body)[16:]) == body
    for bad in [{"table": ""}, {"table": "x" * 129}, {"table": "a\nb"}, {"session": "x" * 129}, {"client": 3}]:
        with pytest.raises(ValueError, match=next(iter(bad))):
            hello("push", **{"table": "t", **bad})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown options.*colour"):
        hello("push", "t", colour=1)


def reply(body: bytes, magic: bytes = b"INGESTD\n", version: int = 1, status: int = 0, length: int = -1) -> bytes:
    return struct.pack("<8sHHI", magic, version, status, len(body) if length < 0 else length) + body


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "at least 16 bytes"),
        (reply(b"{}", magic=b"HTTP/1.1"), "is this the address of an ingestd listener"),
        (reply(b"{}", version=2), "chose version 2"),
        (reply(b"{}", status=3), "status 3"),
        (reply(b"{}", length=1), "body of 1 bytes"),
        (reply(b"{}", length=2_097_153), "body of 2097153 bytes"),
        (reply(b"{}", length=3), "announces a body of 3 bytes, got 2"),
        (reply(b"[]"), "not a JSON object"),
        (reply(b"{x"), "not JSON"),
        (reply(b"\xff\xff"), "not JSON"),
        (reply(b"[" * 100_000), "not JSON"),
    ],
)
def test_bytes_that_are_no_reply(data: bytes, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse_reply(data)


def test_numbers_of_a_reply_are_checked() -> None:
    for value in (None, "1", True, 1.5, -1, 1 << 63):
        with pytest.raises(FormatError, match="want a whole number"):
            parse_reply(reply(json.dumps({"held": value}).encode())).integer("held")


def test_refusals_without_the_expected_fields() -> None:
    with pytest.raises(Refused) as refused:
        parse_reply(reply(b'{"diff":[3,{}]}', status=1))
    assert refused.value.code == "unknown" and refused.value.diff == [Difference("", "", "")]
    with pytest.raises(FormatError, match="not a JSON object"):
        parse_notice(b"[]")
