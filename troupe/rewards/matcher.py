"""The child's side of `matching.py`: `python -I -S matcher.py PATTERN`, which answers lines until there are no more.

A line is a JSON object: the texts, and the seconds of processor time that each may take. The answer is a byte for each
text as soon as it is known: 1 where the whole of it matches, else 0. A text that takes longer ends the process by the
system's own timer, which needs nothing of Python; so it ends also where nobody waits for it any more.
"""

import json
import os
import re
import signal
import sys


def main() -> None:
    """Answer until standard input ends."""
    pattern = re.compile(json.loads(sys.argv[1]), re.DOTALL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, and meant for the run
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        for text in asked["texts"]:
            signal.setitimer(signal.ITIMER_PROF, asked["limit_s"])
            matches = pattern.fullmatch(text) is not None
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            os.write(1, b"1" if matches else b"0")


if __name__ == "__main__":
    main()
