"""The paper's ablations in small: cells of a YAML, their runs, and a report with verdicts."""
