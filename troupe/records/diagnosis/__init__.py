"""What the figures of a run say is wrong with it: a table of rules, who watches them, and the words for it."""

from troupe.records.diagnosis.watch import Diagnosis
from troupe.records.diagnosis.words import in_a_line, in_full, remedy_for, steps_of

__all__ = ["Diagnosis", "in_a_line", "in_full", "remedy_for", "steps_of"]
