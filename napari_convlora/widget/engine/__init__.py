"""Buttons to jobs: what runs, in which process, and what becomes of what comes back."""
