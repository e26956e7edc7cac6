"""A process that serves a run, says the pids of what it started, and waits to be killed."""

import sys
import time
from pathlib import Path

from troupe.cluster.server import serving

with serving(Path(sys.argv[1]), "127.0.0.1:0", store_bytes=1024 * 1024) as message_server:
    print(*message_server.pids, flush=True)
    time.sleep(600)
