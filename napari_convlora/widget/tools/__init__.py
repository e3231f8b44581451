"""Tools of the canvas: prompts for single objects, and regions to accept or reject."""
