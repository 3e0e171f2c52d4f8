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
            case protocol.Flush(id_):
                self._books.flush(client)
                return protocol.Ok(id_)
            case protocol.GetChanges(id_, since):
                return protocol.Changes(id_, *self._books.changes(client, since))
            case protocol.GetStats(id_):
                return protocol.StatsReply(id_, self._stats())
        return (
            self._give_pages(client, message)
            or self._heed(client, message)
            or self._note(client, message)
        )

    def _heed(self, client: bytes, message: protocol.Message) -> protocol.Reply | None:
        match message:
            case protocol.Retain(id_, path, seconds, tenant):
                return protocol.Hinted(id_, *self._books.retain(client, path, seconds, tenant))
            case protocol.Demote(id_, path):
                return protocol.Hinted(id_, *self._books.demote(client, path))
        return None

    def _give_pages(self, client: bytes, message: protocol.Message) -> protocol.Reply | None:
        books, pack = self._books, protocol.pack_pages
        match message:
            case protocol.Lookup(id_, path, start, is_use):
                pages = books.lookup(client, id_, path, start, is_use)
                return protocol.Leased(id_, pack(pages))
            case protocol.Reserve(id_, path):
                have, pages = books.reserve(client, id_, path)
                return protocol.Reserved(id_, have, pack(pages))
            case protocol.LookupLast(id_, path, window):
                length, pages = books.lookup_last(client, id_, path, window)
                return protocol.Last(id_, length, pack(pages))
            case protocol.ReserveEach(id_, path):
                lacking, pages = books.reserve_each(client, id_, path)
                return protocol.Places(id_, pack(lacking), pack(pages))
        return None

    def _note(self, client: bytes, notice: protocol.Message) -> protocol.Reply | None:
        match notice:
            case protocol.Release(lease):
                self._books.release(client, lease)
            case protocol.Touch(path):
                self._books.touch(client, path)
            case protocol.Publish(reservation):
                self._books.publish(client, reservation)
            case protocol.Abandon(reservation):
                self._books.abandon(client, reservation)
        return None
