"""One connection of QUIC with one stream, as packets in and packets out: :class:`Connection`. Needs ``aioquic``.

aioquic does what RFC 9000 and 9001 say, without sockets, threads and clocks. Added here is what it does not do by
itself: flow control that follows the one who reads, TLS's exporter, and the check of what a certificate is for.
"""

from __future__ import annotations

import logging
import os
import ssl
from typing import NamedTuple

from aioquic import tls as engine
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import HandshakeCompleted, QuicEvent, StopSendingReceived, StreamDataReceived, StreamReset
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicProtocolVersion
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from .errors import TLSError
from .tls import TLS
from .tls_exporter import exporter
from .tls_socket import ALPN, context_of

__all__ = ["ROOM_BYTES", "Connection", "Ending", "configuration_of"]

#: Bytes that the daemon may send beyond what was read.
ROOM_BYTES = 4 << 20
#: Seconds without a packet after which the daemon is taken for dead.
IDLE_S = 30.0

_LIMIT_BYTES = 17  # a frame that raises a limit, at most
_ALERT = 0x100  # an error of QUIC that is one of TLS (RFC 9001, 4.8): this, and the alert
_CRYPTO = 0x06  # the frame that TLS travels in

# Alerts by which one side says that it does not trust the other, or never will agree with it (RFC 8446, 6.2).
_FINAL = frozenset((42, 43, 44, 45, 46, 48, 49, 70, 116, 120))
_UNTRUSTED = frozenset((42, 43, 44, 45, 46, 48))
_UNSUPPORTED_CERTIFICATE, _NO_ALPN = 43, 120

_DONE, _IDLE, _STOPPING = 0, 2, 3  # what the daemon closes a connection with

# aioquic warns of what is raised here as an error: whoever does not ask for its log shall not see it.
logging.getLogger("quic").addHandler(logging.NullHandler())


def configuration_of(options: TLS, host: str) -> QuicConfiguration:
    """Reads the files. Raises TLSError."""
    context = context_of(options)  # of the same opinion of the files, with better words
    made = QuicConfiguration(
        alpn_protocols=[ALPN], idle_timeout=IDLE_S, max_data=ROOM_BYTES, max_stream_data=ROOM_BYTES
    )
    made.supported_versions = [QuicProtocolVersion.VERSION_1]
    made.server_name = _server_name(context, host if options.server_name is None else options.server_name)
    if options.insecure_skip_verify:
        made.verify_mode = ssl.CERT_NONE
    elif options.ca is not None:
        made.load_verify_locations(cafile=os.fspath(options.ca))
    else:
        system = ssl.get_default_verify_paths()
        made.load_verify_locations(system.cafile, system.capath)
    if options.cert is not None:
        try:
            made.load_cert_chain(options.cert, options.cert if options.key is None else options.key)
        except (OSError, ValueError, TypeError) as e:
            raise TLSError(f"cert={str(options.cert)!r} cannot be used over quic://: {e}") from e
    return made


def _server_name(context: ssl.SSLContext, name: str) -> str:
    try:
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=name.encode("ascii").decode())
    except ValueError as e:
        raise TLSError(f"TLS: {name!r} is no name that a certificate can have: {e}") from e
    return name


class Ending(NamedTuple):
    """Why a connection is over: in order, or by something that is ``final`` (nobody connects again), or may pass."""

    words: str
    in_order: bool = False
    final: bool = False

    def error(self) -> OSError:
        return TLSError(self.words) if self.final else ConnectionResetError(None, self.words)


class Connection(QuicConnection):
    """The client's side. Its stream is number 0. What was received is the caller's, who says with :meth:`took` when."""

    def __init__(self, configuration: QuicConfiguration) -> None:
        super().__init__(configuration=configuration)
        for streams in (self._local_max_streams_bidi, self._local_max_streams_uni):
            streams.value = streams.sent = 0  # the daemon opens none
        self._took = 0
        self._room_to = ROOM_BYTES  # the daemon may send up to this offset
        self._local = False  # this side ended the connection
        self.exported: bytes | None = None
        #: the handshake is done, and the daemon is who it should be
        self.trusted = False
        #: the daemon's side of the stream is over; ``broken``: not in order
        self.ended = self.broken = False
        #: the daemon wants no more of ours
        self.refusing = False

    # -- events ---------------------------------------------------------------------------------------------------

    def received(self) -> list[bytes]:
        """What came on the stream since the last call."""
        parts = []
        while (event := self.next_event()) is not None:
            parts += self._handle(event)
        return parts

    def _handle(self, event: QuicEvent) -> list[bytes]:
        if isinstance(event, HandshakeCompleted):
            self._trust(event)
        elif getattr(event, "stream_id", 0) != 0:
            pass
        elif isinstance(event, StreamDataReceived):
            self.ended = self.ended or event.end_stream
            return [event.data] if event.data else []
        elif isinstance(event, StreamReset):
            self.ended = self.broken = True
        elif isinstance(event, StopSendingReceived):
            self.refusing = True
        return []

    def _trust(self, event: HandshakeCompleted) -> None:
        """Looks at what aioquic leaves to others. Nothing of ours, a certificate for instance, has been sent yet."""
        if event.alpn_protocol != ALPN:
            self._refuse(_NO_ALPN, f"who listens there does not speak {ALPN} over QUIC; is it an ingestd listener?")
        elif self.configuration.verify_mode != ssl.CERT_NONE and not _of_a_server(self.tls._peer_certificate):
            self._refuse(_UNSUPPORTED_CERTIFICATE, "it is not for servers (extended key usage)")
        else:
            self.trusted = True

    def _refuse(self, alert: int, words: str) -> None:
        self.close(error_code=_ALERT + alert, frame_type=_CRYPTO, reason_phrase=words)

    # -- the end --------------------------------------------------------------------------------------------------

    def close(
        self, error_code: int = QuicErrorCode.NO_ERROR, frame_type: int | None = None, reason_phrase: str = ""
    ) -> None:
        """As aioquic's, which calls it too, for what the daemon did wrong."""
        self._local = self._local or self._close_event is None
        super().close(error_code, frame_type, reason_phrase)

    def ending(self) -> Ending | None:
        """Why the connection is over, as soon as that is known: aioquic tells only after a pause of draining."""
        event = self._close_event
        if event is None:
            return None
        code, words = event.error_code, _printable(event.reason_phrase)
        if event.frame_type is None:  # said by the application
            known = {_IDLE: "it was idle for too long", _STOPPING: "the daemon is stopping"}
            return Ending(known.get(code, f"the daemon closed it: {words or code}"), in_order=code == _DONE)
        alert = code - _ALERT
        if not 0 <= alert < 256:
            if code == QuicErrorCode.CONNECTION_REFUSED:
                return Ending("the daemon serves no more connections, or none from this address")
            return Ending(words.lower() if words else f"QUIC error {code:#x}")
        if self._local:
            if alert in _UNTRUSTED:
                words = f"the daemon's certificate is not trusted: {words}"
        else:
            words = f"the daemon says: {_name(alert)}"
        return Ending(f"TLS: {words or _name(alert)}", final=alert in _FINAL)

    # -- sending --------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> int:
        """Bytes of ours that the daemon has not acknowledged."""
        stream = self._streams.get(0)
        return 0 if stream is None else len(stream.sender._buffer)

    @property
    def finished(self) -> bool:
        """Both directions are over, and the daemon has all of ours."""
        stream = self._streams.get(0)
        return stream is None or stream.is_finished

    # -- flow control ---------------------------------------------------------------------------------------------

    def took(self, n: int) -> None:
        """So many bytes more were read: the daemon may send as many more, and is told so now and then."""
        self._took += n
        if self._took + ROOM_BYTES - self._room_to >= ROOM_BYTES // 4:
            self._room_to = self._took + ROOM_BYTES

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        """In place of aioquic's, which doubles the limits as bytes come, whether anybody reads them or not."""
        limit = self._local_max_data
        limit.value = self._room_to
        if limit.sent != self._room_to:
            frame = builder.start_frame(
                limit.frame_type, _LIMIT_BYTES, handler=self._on_connection_limit_delivery, handler_args=(limit,)
            )
            frame.push_uint_var(self._room_to)
            limit.sent = self._room_to

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        stream.max_stream_data_local = self._room_to
        if stream.max_stream_data_local_sent != self._room_to and not stream.receiver.is_finished:
            frame = builder.start_frame(
                QuicFrameType.MAX_STREAM_DATA,
                _LIMIT_BYTES,
                handler=self._on_max_stream_data_delivery,
                handler_args=(stream,),
            )
            frame.push_uint_var(stream.stream_id or 0)
            frame.push_uint_var(self._room_to)
            stream.max_stream_data_local_sent = self._room_to

    # -- TLS ------------------------------------------------------------------------------------------------------

    def _update_traffic_key(
        self, direction: engine.Direction, epoch: engine.Epoch, cipher_suite: engine.CipherSuite, secret: bytes
    ) -> None:
        super()._update_traffic_key(direction, epoch, cipher_suite, secret)
        if direction == engine.Direction.DECRYPT and epoch == engine.Epoch.ONE_RTT:
            # Just now the transcript ends with the daemon's Finished, which is what the exporter is derived from.
            assert self.tls.key_schedule is not None
            self.exported = exporter(self.tls.key_schedule.derive_secret(b"exp master"))


def _of_a_server(certificate: x509.Certificate | None) -> bool:
    """Whether the certificate is meant for servers, which aioquic does not ask."""
    assert certificate is not None
    try:
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    except ValueError:
        return False
    return ExtendedKeyUsageOID.SERVER_AUTH in uses or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in uses


def _name(alert: int) -> str:
    try:
        return engine.AlertDescription(alert).name.replace("_", " ")
    except ValueError:
        return f"alert {alert}"


def _printable(words: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in words)
