"""Broadcast: one sender, and any number of listeners who come and go."""

from typing import Generic, TypeVar

from troupe.runtime.mailbox import Channel, Mailbox, refusal

T = TypeVar("T")


class Broadcast(Generic[T]):
    """A channel to any number of listeners who come and go; each keeps the newest messages only.

    A listener that does not read never holds up the sender.
    """

    def __init__(self, name: str, *types: type[T]) -> None:
        self.name = name
        self.closed = False
        self._types = types
        self._channels: dict[int, Channel[T]] = {}

    def listen(self, bound: int, *types: type[T]) -> Mailbox:
        """A mailbox of the newest `bound` messages sent from now on; it ends when the broadcast closes.

        `types`: of these only; all that the broadcast carries where none is named.
        """
        mailbox = Mailbox(f"{self.name} listener")
        channel: Channel[T] = mailbox.channel(self.name, *(types or self._types), bound=bound, overflow="newest")
        if self.closed:
            channel.close()
        else:
            self._channels[id(mailbox)] = channel
        return mailbox

    def leave(self, mailbox: Mailbox) -> None:
        """End a listener's mailbox; leaving twice is no error."""
        channel = self._channels.pop(id(mailbox), None)
        if channel is not None:
            channel.close()

    def send_nowait(self, message: T) -> None:
        """Give a message to everyone who listens now; TypeError for one that the broadcast does not carry."""
        if not isinstance(message, self._types):
            raise TypeError(refusal(self.name, self._types, message))
        for channel in self._channels.values():
            if channel.carries(message):
                channel.send_nowait(message)

    def close(self) -> None:
        """End every listener's mailbox once it has read what is left."""
        self.closed = True
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
