"""A snapshot in pieces, cut by a rank and joined by the engine: what else the rank has to say goes between them."""

from __future__ import annotations

from collections.abc import Iterator

from cineline.core.control import MESSAGE_LIMIT, Piece, Snapshot, UnreadableMessage

PIECE = 2**20
"""Bytes of a piece: a link on which one takes seconds could not carry a video either."""

STATE_LIMIT = MESSAGE_LIMIT // 2
"""Bytes of a snapshot's state: it comes back to ranks in one message, with an image beside it."""


def cut(snapshot: Snapshot) -> Iterator[Piece]:
    """Its pieces, in order.

    Raises:
        ValueError: it is too large to come back.
    """
    state, size = snapshot.state, len(snapshot.state)
    if size > STATE_LIMIT:
        raise ValueError(f"a state of {size} bytes is over the limit of {STATE_LIMIT}")
    return (
        Piece(snapshot.request, snapshot.step, snapshot.expert, at, size, state[at : at + PIECE])
        for at in range(0, max(size, 1), PIECE)
    )


class Joiner:
    """One rank's snapshots, from their pieces as they come: one snapshot's at a time, in order."""

    def __init__(self) -> None:
        self._whose = (0, 0, 0, 0)
        self._state = bytearray()

    def join(self, piece: Piece) -> Snapshot | None:
        """The snapshot whose last piece this is; None before that.

        Raises:
            UnreadableMessage: it is not the piece that is due.
        """
        whose, here = (piece.request, piece.step, piece.expert, piece.of), len(self._state)
        if piece.at != here or (here and whose != self._whose):
            raise UnreadableMessage(
                f"byte {piece.at} of request {piece.request}'s step {piece.step} comes behind {here} bytes of "
                + (f"request {self._whose[0]}'s step {self._whose[1]}" if here else "none")
            )
        self._whose = whose
        self._state += piece.content
        if len(self._state) > min(piece.of, STATE_LIMIT):
            raise UnreadableMessage(f"a snapshot has {len(self._state)} bytes of {min(piece.of, STATE_LIMIT)}")
        if len(self._state) < piece.of:
            return None
        state, self._state = bytes(self._state), bytearray()
        return Snapshot(piece.request, piece.step, piece.expert, state)
