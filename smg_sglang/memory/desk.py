"""Turns a client's message into a step of the books and its reply."""

from collections.abc import Callable

from smg_sglang.memory import protocol
from smg_sglang.memory.books import Books
from smg_sglang.memory.stats import Stats


class Desk:
    """Answers messages of clients that `books` knows; no sockets."""

    def __init__(self, books: Books, stats: Callable[[], Stats]) -> None:
        self._books = books
        self._stats = stats

    def answer(self, client: bytes, message: protocol.Message) -> protocol.Reply | None:
        """Carry out `message`; None for notices. ValueError: the client broke the rules."""
        match message:
            case protocol.Ping(id_):
                return protocol.Ok(id_)
            case protocol.Lookup(id_, path, start):
                pages = self._books.lookup(client, id_, path, start)
                return protocol.Leased(id_, protocol.pack_pages(pages))
            case protocol.Reserve(id_, path):
                have, pages = self._books.reserve(client, id_, path)
                return protocol.Reserved(id_, have, protocol.pack_pages(pages))
            case protocol.Flush(id_):
                self._books.flush(client)
                return protocol.Ok(id_)
            case protocol.GetStats(id_):
                return protocol.StatsReply(id_, self._stats())
        self._note(client, message)
        return None

    def _note(self, client: bytes, notice: protocol.Message) -> None:
        match notice:
            case protocol.Release(lease):
                self._books.release(client, lease)
            case protocol.Touch(path):
                self._books.touch(client, path)
            case protocol.Publish(reservation):
                self._books.publish(client, reservation)
            case protocol.Abandon(reservation):
                self._books.abandon(client, reservation)
