"""Tools and worlds to act in, at arm's length.

A tool is a function, an environment a class (`convention.py`). They are read and checked once (`loading.py`,
`describing.py`, `schemas.py`); what a policy says is understood (`calls.py`) and answered (`turns.py`).
"""

from troupe.environments.convention import StepResult
from troupe.environments.settings import EnvironmentConfig

__all__ = ["EnvironmentConfig", "StepResult"]
