"""The daemon's side of publishers, for the tests."""

from __future__ import annotations

from typing import Any

from ingestd import Manifest
from ingestd.weights_segment import WeightsSegment

from fakes import Listener, Peer
from weights_fakes import MANIFEST, WeightsMaker, digest_of, flat, hear, hear_chunk, say, sums_of, tensors

CHUNK = 65_536


class Table:
    """The daemon's side of publishers, one script per connection."""

    def __init__(self, listener: Listener, in_place: bool) -> None:
        self.listener, self.in_place = listener, in_place
        self.address = listener.address
        self.maker = WeightsMaker()
        self.newest = 0

    def accept(self, peer: Peer, **over: Any) -> dict[str, Any]:
        body = peer.hello()
        assert body["role"] == "publish" and body["table"] == "w"
        assert Manifest.from_dict(body["manifest"]) == self.maker.manifest
        assert body.get("in_place", False) is self.in_place
        reply = {"table": "w", "publisher": 9, "newest": self.newest, "chunk_bytes": CHUNK}
        if self.in_place:
            reply["segment_bytes"] = self.maker.bytes
        peer.reply({**reply, **over}, fds=[self.maker.fd] if self.in_place else None)
        return body

    def give(self, peer: Peer, generation: int) -> int:
        """Answers a begin; the place."""
        asked = hear(peer)
        assert asked["op"] == "begin" and asked["deadline_ms"] >= 0
        place = generation % self.maker.places
        self.maker.word(self.maker.place(place), 0)
        say(peer, op="place", generation=generation, place=place)
        return place

    def take(self, peer: Peer, generation: int) -> None:
        """Takes one generation, which must be that of `tensors`, and publishes it."""
        self.take_unanswered(peer, generation)
        self.newest = generation
        say(peer, op="published", generation=generation, digest=digest_of(sums_of(tensors(generation))).hex())

    def take_unanswered(self, peer: Peer, generation: int) -> None:
        place = self.give(peer, generation)
        maker = self.maker
        if self.in_place:
            assert hear(peer) == {"op": "commit", "generation": generation}
            at = maker.place(place)
            assert bytes(maker.memory[at + maker.data_offset :][: MANIFEST.data_bytes]) == flat(tensors(generation))
            assert WeightsSegment(maker.memory).sums(place).tolist() == sums_of(tensors(generation))
            return
        data = bytearray(MANIFEST.data_bytes)
        came = 0
        while n := hear_chunk(peer, MANIFEST, generation, 9, data):
            assert n == min(CHUNK, MANIFEST.data_bytes - came)
            came += n
        assert hear(peer) == {"op": "commit", "generation": generation}
        assert came == MANIFEST.data_bytes and bytes(data) == flat(tensors(generation))
