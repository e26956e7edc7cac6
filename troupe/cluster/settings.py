"""The `[cluster]` section of a configuration."""

import re
from typing import Annotated

import msgspec

_PLACE = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(\d{1,5})")

_SHORTEST_LEASE_S = 5.0
"""Two beats and a half."""


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How workers on other machines do a run's work. Nothing here changes what is computed in the pinned schedule."""

    serve: str | None = None
    """HOST:PORT at which workers find the run: an address of this machine, `0.0.0.0` for all of them; port 0: one that
    is free. None: no workers."""
    lease_s: Annotated[float, msgspec.Meta(le=3600)] = 15.0
    """Seconds after a worker was heard of last, when what it had in hand goes to another; 5 or more, since workers
    are heard of every 2 s."""
    audit: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    """Share of the parts that a worker has decoded of which a second member, or the run itself, makes the same before
    they are used; who answers otherwise is put out. Not where the policy acts. In the free schedule, where bits may
    differ, log-probs of that share are computed anew instead."""
    max_logp_difference: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    """In the free schedule: mean difference, in nats a token, between the log-probs that a worker tells and the newest
    policy's, above which it is put out."""
    local_parts: bool = True
    """Whether the generator's processes of this machine decode beside the workers. false: nobody decodes while there is
    no worker, and the run says that it waits."""

    full_every: Annotated[int, msgspec.Meta(ge=1)] = 32
    """Of so many versions of the policy one goes to workers whole, and the others as what has changed since, which for
    low learning rates is a small part. It takes one more version in memory; 1: all of them go whole."""

    def __post_init__(self) -> None:
        if not self.lease_s >= _SHORTEST_LEASE_S:
            raise ValueError(
                f"cluster.lease_s is {self.lease_s:g}, but workers are heard of every 2 s, and one beat may be lost or "
                f"late: give {_SHORTEST_LEASE_S:g} or more"
            )
        found = None if self.serve is None else _PLACE.fullmatch(self.serve)
        if self.serve is not None and (found is None or int(found[2]) > 65535):
            raise ValueError(
                f"cluster.serve is {self.serve!r}, which is no HOST:PORT; for workers on this machine give "
                "127.0.0.1:0, for others one of its addresses, or 0.0.0.0:4222 for all of them"
            )
