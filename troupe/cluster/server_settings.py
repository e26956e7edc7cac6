"""What the message server is told: where it listens, whom it knows, what they may, how much it takes.

Workers have an account apart from the hub's: what they may ask of the hub and read of the weights is imported into it,
and nothing else of the hub's can be named there. So a reply, which a server sends wherever the asker wants it, never
lands among what is stored. Of that account a worker may publish and hear only what has its name.
"""

from pathlib import Path
from typing import Any

from troupe.cluster.addresses import Place
from troupe.cluster.bus import MAX_BYTES, asked_subjects, hub_subject, inbox_of, stored_subject
from troupe.cluster.users import User, UserList, stream_of

CONNECTIONS = 512
"""That the server has at once."""
_KEPT_CONNECTIONS = 16
"""Of them, which workers cannot take."""
LOG = "nats.log"
LOG_BYTES = 1024 * 1024
_HEADERS_BYTES = 4096
_PENDING_BYTES = 64 * 1024 * 1024


def server_settings(known: UserList, hub_key: str, place: Place, folder: Path, store_bytes: int) -> dict[str, Any]:
    """The server's configuration; `folder`: its own."""
    return {
        "server_name": known.run,
        "host": place.host,
        "port": place.port,
        "tls": {
            "cert_file": str(folder / "server.pem"),
            "key_file": str(folder / "server.key"),
            "handshake_first": True,
            "min_version": "1.3",
            "timeout": 3,
        },
        "authorization": {"timeout": 3},
        "system_account": "SYS",
        "accounts": accounts(known, hub_key, store_bytes),
        "jetstream": {"store_dir": str(folder / "store"), "max_mem": store_bytes, "max_file": 0},
        "max_payload": MAX_BYTES + _HEADERS_BYTES,
        "max_pending": _PENDING_BYTES,
        "max_connections": CONNECTIONS,
        "max_control_line": 2048,
        "write_deadline": "10s",
        "ping_interval": "10s",
        "ping_max": 2,
        "log_file": str(folder / LOG),
        "log_size_limit": LOG_BYTES,
        "logfile_max_num": 2,
    }


def stream(run: str) -> dict[str, Any]:
    """The stream of what is stored for all workers, as it is declared."""
    return {
        "name": stream_of(run),
        "subjects": [stored_subject(run, ">")],
        "storage": "memory",
        "retention": "limits",
        "max_msgs_per_subject": 1,
        "max_msg_size": MAX_BYTES,
        "discard": "new",
        "allow_direct": True,
        "num_replicas": 1,
        "max_consumers": 1,
    }


def accounts(known: UserList, hub_key: str, store_bytes: int) -> dict[str, Any]:
    """The server's accounts, as its configuration has them. A change of users changes nothing else: servers that are
    told of other imports while they run lose some."""
    asks = asked_subjects(known.run)
    read = f"$JS.API.DIRECT.GET.{stream_of(known.run)}.{stored_subject(known.run, '>')}"
    return {
        "SYS": {},
        "HUB": {
            "users": [{"nkey": hub_key}],
            "jetstream": {"max_mem": store_bytes, "max_file": 0, "max_streams": 4, "max_consumers": 1},
            "exports": [{"service": subject} for subject in (asks, read)],
        },
        "WORKERS": {
            "users": [{"nkey": user.key, "permissions": _allowed(known.run, user, read)} for user in known.users],
            "imports": [{"service": {"account": "HUB", "subject": subject}} for subject in (asks, read)],
            "limits": {"max_connections": CONNECTIONS - _KEPT_CONNECTIONS, "max_payload": MAX_BYTES},
        },
    }


def _allowed(run: str, user: User, read: str) -> dict[str, Any]:
    return {
        "publish": {"allow": [hub_subject(run, user.name, ">"), read]},
        "subscribe": {"allow": [f"{inbox_of(user.name)}.>"]},
    }
