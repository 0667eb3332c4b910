"""Readers over TCP against the real daemon, and against daemons that send anything but batches."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ingestd import (
    AllHeld,
    Closed,
    EndOfStream,
    Error,
    FormatError,
    LostBatches,
    PeerClosed,
    Producer,
    Reader,
    Refused,
    Released,
    Spec,
    Timeout,
)
from ingestd.received import Places

from real import PATIENCE, POINT, Serve, points, verify

SPEC = Spec.parse("a:U8,b:U16")


def test_the_same_batches_as_mapped(serve: Serve) -> None:
    d = serve(batch_size=16, batches=8, linger="10ms")
    with Reader(d.unix, "t", group="a") as mapped, Reader(d.tcp, "t", POINT, group="b") as sent:
        assert sent.spec == mapped.spec and sent.batch_size == 16 and sent.group == "b"
        with Producer(d.tcp, "t", POINT) as p:
            for n in (16, 5, 16, 1):
                p.push_batch(points(1, 0, n), deadline=PATIENCE)
                with mapped.next(PATIENCE) as want, sent.next(PATIENCE) as got:
                    assert (got.seq, got.count) == (want.seq, want.count) == (want.seq, n) and got.intact
                    for a, b in zip(
                        [*got.leaves, got.stream, got.number, got.arrival],
                        [*want.leaves, want.stream, want.number, want.arrival],
                    ):
                        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
                        assert a.ctypes.data % 64 == 0 and not a.flags.writeable
    with pytest.raises(Released):
        got.leaves  # noqa: B018
    with pytest.raises(Closed):
        sent.next(0)


def test_all_held_and_any_order(serve: Serve) -> None:
    d = serve(batch_size=16, batches=8)
    with Reader(d.tcp, "t", prefetch=2) as r, Producer(d.unix, "t", POINT) as p:
        p.push_batch(points(1, 0, 64), deadline=PATIENCE)
        first, second = r.next(PATIENCE), r.next(PATIENCE)
        with pytest.raises(AllHeld):
            r.next(0.05)
        second.release()
        third = r.next(PATIENCE)
        assert [b.seq for b in (first, second, third)] == [0, 1, 2]
        assert verify(first.tree, 3) == (1, 3) and verify(third.tree, 0) == (1, 32)
        first.release()
        third.release()
        with r.next(PATIENCE) as last:
            assert last.seq == 3
        with pytest.raises(Timeout, match="waiting for a batch"):
            r.next(0.01)


def test_refusals_and_limits(serve: Serve) -> None:
    d = serve(batch_size=16, batches=8)
    with pytest.raises(Refused, match="no table"):
        Reader(d.tcp, "u")
    with pytest.raises(Refused) as e:
        Reader(d.tcp, "t", "x:U8")
    assert e.value.code == "spec_mismatch"
    with pytest.raises(Error, match="smaller prefetch"):
        Reader(d.tcp, "t", prefetch=2, memory=1000)


def test_nothing_is_lost_when_the_daemon_is_killed(serve: Serve, tmp_path: Path) -> None:
    d = serve(batch_size=16, batches=16, segment_dir=str(tmp_path))
    with Reader(d.tcp, "t", prefetch=4) as r, Producer(d.tcp, "t", POINT, session="s") as p:
        p.push_batch(points(1, 0, 160), deadline=PATIENCE)
        p.flush(PATIENCE)
        held = r.next(PATIENCE)
        with r.next(PATIENCE) as b:
            seen = set(b.number.tolist())
        d.restart()
        while len(seen) < 160:
            with r.next(PATIENCE) as b:
                for row in range(b.count):
                    assert verify(b.tree, row) == (1, int(b.number[row]))
                seen.update(b.number.tolist())
        assert verify(held.tree, 0) == (1, 0) and held.intact and r.reconnects >= 1
        held.release()


def test_who_comes_again_is_not_served_beside_itself(serve: Serve) -> None:
    """A daemon that has not heard of the end of a connection yet takes back what it held all the same."""
    d = serve(batch_size=16, batches=8)
    with Reader(d.tcp, "t", prefetch=2) as r, Reader(d.tcp, "t", group="other"), Producer(d.unix, "t", POINT) as p:
        p.push_batch(points(1, 0, 64), deadline=PATIENCE)
        first = r.next(PATIENCE)
        assert first.seq == 0
        with r._receiver.sock.dup() as kept:  # type: ignore[attr-defined]
            kept.shutdown(socket.SHUT_RD)  # of which the daemon learns nothing
            seen: list[int] = []
            while seen[-1:] != [3]:
                with r.next(PATIENCE) as b:
                    seen.append(b.seq)
                    assert verify(b.tree, 0) == (1, 16 * b.seq)
        first.release()
        assert [seq for seq in seen if seq != 1] == [0, 2, 3]  # batch 1 had come already, before the end was seen
        assert r.reconnects == 1  # type: ignore[attr-defined]


def test_a_reader_that_dies_loses_nothing(serve: Serve) -> None:
    d = serve(batch_size=16, batches=8)
    with Producer(d.unix, "t", POINT) as p:
        r = Reader(d.tcp, "t", prefetch=2)
        p.push_batch(points(1, 0, 64), deadline=PATIENCE)
        r.next(PATIENCE)
        r.close()
        with Reader(d.tcp, "t") as other:
            for seq in range(4):
                with other.next(PATIENCE) as b:
                    assert b.seq == seq


def frame(number: int, rows: int, **changes: int) -> bytes:
    fields = {"magic": 0x48435442, "rows": rows, "number": number, "lost_first": 0, "lost": 0}
    fields.update({"payload": rows * 27, "columns": 5 if rows else 0, **changes})
    head = struct.pack("<IIQQQQI20x", *fields.values())
    words = np.concatenate([np.full(rows, 7), np.arange(rows), np.arange(rows)]).astype("<u8").tobytes()
    return head + words + bytes([number]) * rows * 3


def notice(code: str) -> bytes:
    body = json.dumps({"code": code, "reason": "so it is"}).encode()
    return b"\0" + struct.pack("<I", len(body)) + body


@pytest.fixture
def speak() -> Iterator[object]:
    """speak(data): the address of a daemon of a table of SPEC in batches of 4 that accepts and says data.

    ``then_end``: it ends each connection then. ``more`` is said once the reader has said its last word, which is put
    into ``heard``, and its hellos into ``hellos``.
    """
    listeners = []

    def start(
        data: bytes,
        then_end: bool = False,
        more: bytes = b"",
        heard: list[bytes] | None = None,
        hellos: list[dict[str, object]] | None = None,
    ) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def answer(conn: socket.socket) -> None:
            head = conn.recv(16, socket.MSG_WAITALL)
            said = conn.recv(int.from_bytes(head[12:], "little"), socket.MSG_WAITALL)
            if hellos is not None:
                hellos.append(json.loads(said))
            fields = {"table": "t", "spec": SPEC.to_dict(), "fingerprint": SPEC.fingerprint, "trainer": 1}
            body = json.dumps({**fields, "group": "default", "batch_size": 4, "prefetch": 2}).encode()
            conn.sendall(struct.pack("<8sHHI", b"INGESTD\n", 1, 0, len(body)) + body + data)
            said = b""
            while not then_end and (part := conn.recv(4096)):
                said += part
            conn.sendall(more)
            if heard is not None:
                heard.append(said)

        def serve() -> None:
            with contextlib.suppress(OSError):  # the end of the test
                while True:
                    conn, _ = listener.accept()
                    with conn, contextlib.suppress(ConnectionError):
                        answer(conn)

        threading.Thread(target=serve, daemon=True).start()
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n" + b" " * 64,
        frame(0, 5),
        frame(0, 4, payload=1 << 60),
        frame(0, 4, columns=4),
        frame(0, 0),
        frame(0, 4, magic=1),
        frame(0, 4) + frame(1, 1) + frame(2, 1),
        b"\0\xff\xff\xff\xff",
    ],
)
def test_what_is_no_batch_ends_the_reader(speak, data: bytes) -> None:  # type: ignore[no-untyped-def]
    with Reader(speak(data), "t", prefetch=2) as r:
        held = []
        with pytest.raises(FormatError):
            while True:
                with contextlib.suppress(AllHeld):  # the third may not have been looked at yet
                    held.append(r.next(PATIENCE))
        for b in held:
            b.release()


def test_losses_and_the_end(speak) -> None:  # type: ignore[no-untyped-def]
    say = frame(5, 4, lost_first=2, lost=3) + frame(0, 0, lost_first=6, lost=1) + notice("end_of_stream")
    with Reader(speak(say), "t") as r:
        with pytest.raises(LostBatches):
            r.next(PATIENCE)
        with r.next(PATIENCE) as b:
            assert (b.seq, b.count) == (5, 4) and b["b"].tolist() == [0x0505] * 4
        with pytest.raises(LostBatches):
            r.next(PATIENCE)
        with pytest.raises(EndOfStream):
            r.next(PATIENCE)
        assert r.lost == 4


def test_patience_ends(speak) -> None:  # type: ignore[no-untyped-def]
    with Reader(speak(frame(0, 4)[:70], then_end=True), "t", reconnect=0.0) as r, pytest.raises(PeerClosed):
        r.next(PATIENCE)


@pytest.mark.parametrize(
    "data",
    [b"", frame(0, 4)[:10], frame(0, 4)[:100], frame(0, 0, lost_first=1, lost=1), notice("internal")],
    ids=["nothing", "part of a header", "part of a batch", "a loss", "trouble"],
)
def test_patience_with_breaks(speak, data: bytes) -> None:  # type: ignore[no-untyped-def]
    """A daemon that accepts and ends each connection is given up as one that is gone is, and costs no memory."""
    hellos: list[dict[str, object]] = []
    with Reader(speak(data, True, hellos=hellos), "t", prefetch=2, reconnect=0.5, on_lost="count") as r:
        with pytest.raises(PeerClosed):
            r.next(PATIENCE)
        assert hellos[0]["session"] and all(h == hellos[0] for h in hellos)
        assert r.reconnects > 0 and len(r._receiver.places.memory) <= 1 and len(r._receiver._arrived) <= 1


def test_each_batch_begins_patience_anew(speak) -> None:  # type: ignore[no-untyped-def]
    with Reader(speak(frame(0, 4) + frame(1, 4)), "t", prefetch=2) as r:
        receiver = r._receiver
        receiver._spent = 5.0
        assert not receiver._given
        r.next(PATIENCE).release()
        assert receiver._given


def test_endless_losses(speak) -> None:  # type: ignore[no-untyped-def]
    """They cost no memory, and are told as one."""
    n = 20_000
    say = b"".join(frame(0, 0, lost_first=10 + k, lost=2) for k in range(n))
    say += frame(0, 0, lost_first=7, lost=(1 << 64) - 1) + frame(5, 4)
    with Reader(speak(say), "t", prefetch=2) as r:
        receiver = r._receiver
        with receiver._state:
            assert receiver._state.wait_for(lambda: any(d.rows for d in receiver._arrived), PATIENCE)
            assert len(receiver._arrived) == 2
        with pytest.raises(LostBatches) as e:
            r.next(PATIENCE)
        assert (e.value.first, e.value.n) == (10, (1 << 63) - 1)
        with r.next(PATIENCE) as b:
            assert b.seq == 5


def test_no_memory_is_an_error(speak, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Whatever ends the thread that receives, nobody waits for it."""

    def none(self: object) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(Places, "add", none)
    with Reader(speak(frame(0, 4)), "t", prefetch=2) as r, pytest.raises(Error, match="no room") as e:
        r.next(PATIENCE)
    assert isinstance(e.value.__cause__, MemoryError)


def test_the_last_word(speak) -> None:  # type: ignore[no-untyped-def]
    """A reader that closes says how many batches it has begun, and reads what still comes until the daemon ends."""
    heard: list[bytes] = []
    say = frame(0, 4) + frame(1, 4)
    r = Reader(speak(say[:300], more=say[300:], heard=heard), "t", prefetch=2)
    r.next(PATIENCE).release()
    r.close()
    assert heard == [struct.pack("<QQ", 0, 1 << 63 | 1)]
    with pytest.raises(Closed):
        r._receiver.take()


def test_what_was_not_begun_is_offered_again(serve: Serve) -> None:
    """Also by a group that drops what a dead reader held; what this one held is dropped."""
    d = serve(batch_size=16, batches=8, more={"groups": [{"name": "g", "on_death": "drop"}]})
    with Producer(d.unix, "t", POINT) as p:
        r = Reader(d.tcp, "t", group="g", prefetch=3)
        p.push_batch(points(1, 0, 64), deadline=PATIENCE)
        held = r.next(PATIENCE)
        receiver = r._receiver
        with receiver._state:
            assert receiver._state.wait_for(lambda: len(receiver._arrived) == 2, PATIENCE)
        r.close()
        assert held.seq == 0
        with Reader(d.tcp, "t", group="g") as other:
            for seq in range(1, 4):
                with other.next(PATIENCE) as b:
                    assert b.seq == seq
