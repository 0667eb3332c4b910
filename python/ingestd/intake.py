"""What producers have sent, from the chunks in the ring: :class:`Intake`, under :class:`ingestd.grads.GradReader`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from . import native
from ._io import Address, Deadline
from .batch import Batch
from .chunks import (
    ABORT,
    BEGIN,
    CLOSED,
    END,
    HEADER_BYTES,
    NO_CRC,
    OPENED,
    REFUSED,
    Header,
    chunk_bytes_of,
    parse_end,
    producer_id,
)
from .errors import ChunkError, FormatError, Refused, SpecError
from .gather import Held, Piece, Raw, Source, Transaction
from .gradstep import GradStats
from .manifest import Manifest
from .reader import Reader
from .redial import Dialer
from .remote_reader import RemoteReader
from .sums import Plan
from .wire import hello

__all__ = ["Intake", "by_name"]

_SOURCES_MAX = 4096  # producers that are remembered although they are gone
_MANIFESTS_MAX = 32  # that are remembered
_ANSWER_S = 10.0  # seconds that the daemon has to answer a question


def by_name(name: str) -> bytes:
    """The order in which producers are summed."""
    return name.encode()


class Intake:
    """Takes chunks as they come, verifies each, and keeps what belongs to steps that are still to be returned."""

    def __init__(
        self,
        address: Address,
        table: str,
        client: str,
        manifest: Manifest | None,
        stats: GradStats,
        patience: float | None = _ANSWER_S,
    ) -> None:
        self.stats = stats
        #: the tensors in force
        self.current = manifest
        #: producers, by name
        self.sources: dict[str, Source] = {}
        #: the last step that was returned: what comes of it, and of those before it, is late
        self.done = -1
        #: the step that is waited for, and the sum that is made of it meanwhile
        self.wanted: tuple[int, Plan | None] = (-1, None)
        #: something has come that may end the wait
        self.news = True
        self._address, self._table, self._client, self._patience = address, table, client, patience
        self._created = 0  # when the ring was made that the last batch was sent from
        self._heralds = -1, 0  # stream and number of the sample of the daemon's own that comes next
        self._pinned = manifest is not None
        self._manifests: dict[int, Manifest] = {} if manifest is None else {manifest.id: manifest}
        self._streams: dict[int, Source] = {}
        self._before = 0  # batches below were published before this attachment, by a daemon that has died

    def attach(self, reader: Reader) -> None:
        """The batches that come are of this reader. Raises SpecError where its table has another kind."""
        #: most data bytes of a chunk
        self.chunk_bytes = chunk_bytes_of(reader.spec)
        self._places = reader.places if isinstance(reader, RemoteReader) else None
        if self._places is None:
            self._segment = reader._segment
            self._memory: Raw = np.frombuffer(reader._memory, np.uint8)

    def attach_again(self, reader: Reader) -> None:
        """As :meth:`attach`, after a daemon has gone."""
        if self._places is not None:  # each batch says of which ring it is
            self.attach(reader)
            return
        created = self._segment.created
        self.attach(reader)
        if self._segment.created == created:
            self._before = self._segment.published
        else:  # another segment: its numbers begin again
            self._before = 0
            self._streams.clear()
        self._all_away()

    def _all_away(self) -> None:
        for source in self.sources.values():
            source.live = False
        self.news = True

    def _made(self, created: int) -> None:
        """The next batch was sent from the ring made then."""
        if self._created not in (0, created):
            self._streams.clear()
            self._heralds = -1, 0
            self._all_away()
        self._created = created

    def take(self, batch: Batch) -> Held:
        """Takes the chunks of a batch; it is released if nothing of it is needed."""
        held = Held(batch)
        if self._places is not None:
            self._made(self._places.created[batch.place])
        for row in range(batch.count):
            self._take_chunk(held, row)
        if not held.pieces:
            held.release()
        return held

    def _take_chunk(self, held: Held, row: int) -> None:
        if self._places is None:
            segment = self._segment
            memory, place = self._memory, segment.place(held.batch.place)
            stream = segment._words[(place + segment.stream_column) // 8 + row]
            number = segment._words[(place + segment.number_column) // 8 + row]
            header_at, data_at = (place + c.offset + row * c.slot_bytes for c in segment.columns)
        else:
            memory = self._places.memory[held.batch.place]
            stream, number = int(held.batch.stream[row]), int(held.batch.number[row])
            header_at, data_at = (c.offset + row * c.slot_bytes for c in self._places.columns)
        try:
            header = Header.parse(memory[header_at : header_at + HEADER_BYTES].tobytes())
            heard = bool(header.flags & (OPENED | CLOSED))
            if heard == (stream == header.stream):
                raise ChunkError(f"it says stream {header.stream}, and came in stream {stream}")
            if heard:
                self._herald(header, stream, number)
                return
            source = self._source(stream, header.producer)
            manifest = self._manifest_of(header.manifest)
            if manifest is None:
                raise ChunkError(f"nobody knows its manifest {header.manifest:016x}")
            header.check(manifest, self.chunk_bytes)
        except ChunkError as e:
            self._damaged(self._streams.get(stream), number, e)
            return
        if not self._in_order(source, number):
            return
        if held.batch.seq >= self._before:
            self._alive(source, manifest)
        self._take_of(source, manifest, header, number, memory[data_at : data_at + header.length], held)

    def _damaged(self, source: Source | None, number: int, error: ChunkError) -> None:
        """A chunk of which nothing can be believed but the stream in which it came."""
        self.stats.bad_chunks += 1
        self.news = True
        if source is not None and self._in_order(source, number):
            source.damaged = str(error)
            for tx in list(source.transactions.values()):
                if not tx.complete:
                    source.fail(tx.step, str(error))

    def _in_order(self, source: Source, number: int) -> bool:
        """Whether a sample is due in its stream. Where some before it are missing, so are bytes, or a beginning."""
        if 0 <= number < source.next and number not in source.again:
            self.stats.duplicates += 1
            return False
        if number > source.next >= 0:
            for tx in list(source.transactions.values()):
                if not tx.complete:
                    source.fail(tx.step, f"incomplete: {number - source.next} chunks did not come to this reader")
                    self.news = True
        source.next = max(source.next, number + 1)
        return True

    def _alive(self, source: Source, manifest: Manifest) -> None:
        """Notes that a producer is connected."""
        if not source.live or source.manifest != manifest.id:
            source.live, source.manifest, self.news = True, manifest.id, True
            if not self._pinned:
                self.current = manifest

    def _herald(self, header: Header, stream: int, number: int) -> None:
        """A sample of the daemon's own. One that comes again over a connection may not be true any more."""
        if self._places is not None:
            if (stream, number) < self._heralds:
                self.stats.duplicates += 1
                return
            self._heralds = stream, number + 1
        self._hear(header)

    def _hear(self, header: Header) -> None:
        """What the daemon says of a producer."""
        source = self._source(header.stream, header.producer)
        manifest = self._manifest_of(header.manifest) if header.has(OPENED) else None
        if manifest is not None:
            self._alive(source, manifest)
        source.live = header.has(OPENED)
        self.news = True

    def _source(self, stream: int, producer: int) -> Source:
        """The producer of a stream; its name is in the segment's session table, or the daemon is asked for it."""
        source = self._streams.get(stream)
        if source is None:
            name = self._name(stream)
            if name is None or producer_id(name) != producer:
                name = f"stream {stream}"
            source = self._streams[stream] = self.sources.setdefault(name, Source(name))
            self._streams.pop(source.stream, None)
            source.stream, source.next = stream, -1
            source.again.clear()
        return source

    def _name(self, stream: int) -> str | None:
        if self._places is not None:
            said = self._ask("unknown_session", session_of=stream)
            return None if said is None else str(said.get("session", ""))
        s = self._segment
        raw = self._memory[s.sessions_offset : s.sessions_offset + 256 * s.sessions_max]
        table = raw.view(np.uint64).reshape(-1, 32)
        for at in np.flatnonzero((table[:, 0] == 1) & (table[:, 1] == stream)):
            return s._entry_name(s.sessions_offset + 256 * int(at), "session")
        return None

    def _manifest_of(self, number: int) -> Manifest | None:
        """The manifest of that id; the daemon is asked once. None where it does not know it. Raises FormatError."""
        found = self._manifests.get(number)
        if found is None:
            said = self._ask("unknown_manifest", manifest_id=f"{number:016x}")
            if said is None:
                return None
            try:
                found = Manifest.from_dict(said.get("manifest"))
            except SpecError as e:
                raise FormatError(f"the daemon's manifest cannot be read: {e}") from e
            if found.id != number:
                raise FormatError(f"the daemon gave manifest {found.id:016x} for {number:016x}")
            if len(self._manifests) >= _MANIFESTS_MAX:
                used = {m.id for m in (found, self.current) if m is not None}
                self._manifests = {k: m for k, m in self._manifests.items() if k in used}
            self._manifests[number] = found
        return found

    def _ask(self, unknown: str, **what: Any) -> dict[str, Any] | None:
        """Asks the daemon, with a connection for this one question; None where it refuses with the code ``unknown``."""
        body = hello("manifest", self._table, None, token=self._address.token, client=self._client, **what)
        dialer = Dialer(self._address, body, None)
        try:
            if self._places is None:  # a daemon that has gone is attached to again before anything is asked
                opened = dialer.open(Deadline(_ANSWER_S))
            else:
                opened = dialer.open_patiently(Deadline(self._patience))
        except Refused as e:
            if e.code != unknown:
                raise
            return None
        opened.close()
        return opened.reply.body

    def _take_of(self, source: Source, manifest: Manifest, header: Header, number: int, raw: Raw, held: Held) -> None:
        """One chunk of a producer, whose header is right."""
        step = header.step
        if step <= self.done:
            self.stats.late += 1
            return
        self.news = self.news or header.flags != 0
        tx = source.transactions.get(step)
        if header.has(REFUSED):
            self.stats.refused += 1
            if tx is None or not tx.complete:
                source.fail(step, "too old")
            return
        if tx is not None and tx.complete:
            self.stats.duplicates += not header.has(ABORT)
            return
        if header.has(ABORT):
            source.drop(step)
            source.reasons[step] = "aborted"
            return
        again = number in source.again
        source.again.discard(number)
        if header.has(BEGIN) and not again:
            tx = self._begin(source, step, manifest)
        if tx is None:
            if step not in source.over:
                source.fail(step, source.damaged or "incomplete: its beginning did not come to this reader")
            return
        source.damaged = ""
        tx.touched = time.monotonic()
        try:
            if not header.has(NO_CRC) and native.crc32c(raw) != header.data_crc:
                raise header.error(manifest, "the data is damaged: its sum is not the one that the header says")
            self._add(tx, header, number, raw, held)
        except ChunkError as e:
            self.stats.bad_chunks += 1
            self.news = True
            source.fail(step, str(e))

    def _begin(self, source: Source, step: int, manifest: Manifest) -> Transaction:
        """Begins a transaction. Nothing more comes of the one before; or it is begun anew."""
        for before in list(source.transactions.values()):
            if not before.complete and before.step != step:
                source.fail(before.step, source.why(before.step, manifest))
                self.stats.dropped_incomplete += 1
        source.drop(step)
        source.reasons.pop(step, None)
        source.over.discard(step)
        source.newest = step
        tx = source.transactions[step] = Transaction(step, manifest, self.chunk_bytes)
        return tx

    def _add(self, tx: Transaction, header: Header, number: int, raw: Raw, held: Held) -> None:
        """Verified data of a transaction. Raises ChunkError."""
        piece = None
        if header.has(END):
            tx.subset = frozenset(parse_end(tx.manifest, raw.tobytes()))
        elif header.length:
            piece = Piece(header.flat(tx.manifest), header.data_crc, raw, number, held)
            _check_sparse(tx.manifest, piece)
            added = tx.add(piece)
            if added is None:
                raise header.error(tx.manifest, "it overlaps what has come before")
            if not added:
                self.stats.duplicates += 1
                return
            held.pieces.append(piece)
        if tx.check_complete():
            self.news = True
        step, plan = self.wanted
        if piece is not None and plan is not None and step == tx.step:
            plan.advance(self.members(step), tx.cells_of(piece))

    # -- looking --------------------------------------------------------------------------------------------------

    def complete(self, step: int) -> dict[str, Transaction]:
        """The complete transactions of a step, by name, in the order in which they are summed."""
        found = {name: tx for name, s in self.sources.items() if (tx := s.complete(step)) and self._fits(tx)}
        return {name: found[name] for name in sorted(found, key=by_name)}

    def awaited(self, step: int) -> bool:
        """Whether a producer is connected that may still complete the step."""
        return any(
            s.live and s.complete(step) is None and not s.hopeless(step)
            for s in self.sources.values()
            if self.current is None or s.manifest in (0, self.current.id)
        )

    def members(self, step: int) -> list[Transaction]:
        """What will be summed of a step, as it looks now; nothing while one that is awaited has not begun."""
        found: dict[str, Transaction] = {}
        for name, s in self.sources.items():
            tx = s.transactions.get(step)
            if tx is not None and self._fits(tx) and (tx.complete or s.live):
                found[name] = tx
            elif s.live and tx is None and not s.hopeless(step):
                return []
        return [found[name] for name in sorted(found, key=by_name)]

    def missing(self, step: int) -> dict[str, str]:
        """Why producers are not complete in a step, by name."""
        names = sorted(set(self.sources) - set(self.complete(step)), key=by_name)
        return {name: self.sources[name].why(step, self.current) for name in names}

    def _fits(self, tx: Transaction) -> bool:
        return self.current is not None and tx.manifest.id == self.current.id

    def finish(self, step: int) -> dict[str, Transaction]:
        """Hands over what is complete of a step, and drops everything else of it and of those before."""
        members = self.complete(step)
        for name in members:
            del self.sources[name].transactions[step]
        for source in self.sources.values():
            self.stats.dropped_incomplete += source.forget(step)
        self.done = step
        if len(self.sources) > _SOURCES_MAX:
            for name in [n for n, s in self.sources.items() if not s.live and not s.transactions]:
                self._streams.pop(self.sources.pop(name).stream, None)
        return members

    def tidy(self, seconds: float) -> None:
        """Drops steps of which nothing came for so long, and that nobody waits for."""
        now = time.monotonic()
        for source in self.sources.values():
            for step, tx in list(source.transactions.items()):
                if not tx.complete and step != self.wanted[0] and now - tx.touched >= seconds:
                    have, want = tx.progress()
                    source.fail(step, f"incomplete: {have} of {want} bytes, and nothing came for {seconds:g} s")
                    self.stats.dropped_incomplete += 1

    def end(self) -> None:
        """Nothing more will come: what is not complete is given back, for the daemon waits for that."""
        self.news = True
        for source in self.sources.values():
            for tx in list(source.transactions.values()):
                if not tx.complete:
                    have, want = tx.progress()
                    source.fail(tx.step, f"incomplete: {have} of {want} bytes at the end of the table")
                    self.stats.dropped_incomplete += 1

    def lose(self, pieces: list[Piece]) -> None:
        """These pieces are not whole any more: they come again."""
        for source in self.sources.values():
            for tx in source.transactions.values():
                source.again.update(piece.number for piece in tx.remove(pieces))


def _check_sparse(manifest: Manifest, piece: Piece) -> None:
    """Checks that the entries of ``topk`` in a piece name elements of their tensor. Raises ChunkError."""
    i = manifest.at(piece.flat)
    while i < len(manifest) and manifest.offsets[i] < piece.end:
        tensor = manifest[i]
        if tensor.kind == "topk":
            begin, end = max(manifest.offsets[i], piece.flat), min(manifest.ends[i], piece.end)
            bad, _ = native.check_pairs(piece.raw[begin - piece.flat : end - piece.flat], tensor.elements)
            if bad >= 0:
                at = begin - manifest.offsets[i] + 8 * bad
                raise ChunkError("an entry of topk is out of range or out of order", tensor.name, at)
        i += 1
