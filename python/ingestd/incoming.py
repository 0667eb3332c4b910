"""What the daemon writes to a producer after the handshake: acknowledgements, notes, and a closing notice."""

from __future__ import annotations

from .errors import Ended, FormatError, Note, SessionTaken, ShuttingDown
from .wire import ACK, NOTE, NOTICE, NOTICE_BYTES_MAX, parse_note, parse_notice

__all__ = ["Incoming", "ended"]

_HEAD_BYTES = 5  # of a note or a notice: what it is, and its length
_ACK = bytes([ACK])


def ended(code: str, reason: str, detail: str = "") -> Ended:
    """The error for a closing notice."""
    kinds = {"shutting_down": ShuttingDown, "session_taken": SessionTaken}
    return kinds.get(code, Ended)(code, reason, detail)


class Incoming:
    """Reads the daemon's side of one connection."""

    def __init__(self) -> None:
        #: acknowledgements so far
        self.acks = 0
        #: the note in force: an acknowledgement ends it
        self.note: Note | None = None
        #: steps that are not used (``step_refused``); whoever handles them takes them out
        self.refused: list[Note] = []
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Takes what was received. Raises Ended for a closing notice, FormatError; what came before it is counted."""
        data = self._rest + data
        self._rest = b""
        while data:
            rest = data.lstrip(_ACK)
            if len(rest) < len(data):
                self.acks += len(data) - len(rest)
                self.note = None
            if not rest:
                return
            kind = rest[0]
            if kind not in (NOTE, NOTICE):
                raise FormatError(f"the daemon sent {kind:#04x} where an acknowledgement (0x01) was due")
            end = _HEAD_BYTES + int.from_bytes(rest[1:_HEAD_BYTES], "little")
            if len(rest) >= _HEAD_BYTES and not 2 <= end - _HEAD_BYTES <= NOTICE_BYTES_MAX:
                what = "closing notice" if kind == NOTICE else "note"
                raise FormatError(f"the daemon's {what} says it has {end - _HEAD_BYTES} bytes")
            if len(rest) < max(end, _HEAD_BYTES):
                self._rest = rest
                return
            body, data = rest[_HEAD_BYTES:end], rest[end:]
            if kind == NOTICE:
                raise ended(*parse_notice(body))
            note = parse_note(body)
            if note.code == "step_refused":
                self.refused.append(note)
            else:
                self.note = note
