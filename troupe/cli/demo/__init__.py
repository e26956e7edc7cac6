"""The demo that ships: `demo.toml`, a small policy in `policy/`, and sums to train and test it on.

`scripts/make_demo.py` makes the policy and the sums; `demo.toml` is kept by hand.
"""

from pathlib import Path

DEMO_CONFIG = Path(__file__).parent / "demo.toml"
