"""What the parts of the panel do to one another; what each does alone is in its section."""
