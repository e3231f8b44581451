"""Scores of predictions against labels, and the decision better or keep; nothing here trains."""
