"""Published protocols, run end to end from the command line."""
