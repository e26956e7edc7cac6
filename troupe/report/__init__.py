"""`troupe report`: what a run folder tells, as one page that needs nothing else, and as pictures."""

from troupe.report.charts import Chart, Line, Section, sections_of
from troupe.report.page import report_page
from troupe.report.read import RunPicture, read_run

__all__ = ["Chart", "Line", "RunPicture", "Section", "read_run", "report_page", "sections_of"]
