"""The viewer's layers: the only place that reads or writes them; no jobs, no files."""
