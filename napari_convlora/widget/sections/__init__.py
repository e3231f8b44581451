"""The parts of the panel, one module each; they show and ask, others decide."""
