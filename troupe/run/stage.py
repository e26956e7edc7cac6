"""Stage: where the policy acts. The tools and environments of a run, who runs them, and how their conversations are told
in ids."""

import msgspec

from troupe.actors.conversations import Conversations
