"""The keeper: a small process between a run and its message server, so that the server ends with the run.

`python -I -S keeper.py LIFELINE COMMAND…` runs the command, and kills it when the other end of the pipe LIFELINE is
closed, which happens when the run's process is gone however it went. On Linux the kernel kills the command with the
keeper as well. SIGHUP is passed on. Standard library only.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the command to its end → its exit code, or 1 where a signal ended it."""
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the run's; what is ignored would be so in the command
    os.umask(0o077)
    lifeline = int(sys.argv[1])
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def tie() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, preexec_fn=tie)  # no thread runs yet
    signal.signal(signal.SIGHUP, lambda number, frame: server.send_signal(signal.SIGHUP))
    signal.signal(signal.SIGTERM, lambda number, frame: server.terminate())

    def watch() -> None:
        os.read(lifeline, 1)  # nobody writes
        server.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    code = server.wait()
    return code if code >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
