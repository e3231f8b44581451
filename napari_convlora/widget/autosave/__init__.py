"""What is painted, and the rounds, on their way to a project on disk and back."""
