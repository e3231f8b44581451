"""What a trained model says of an image of any size, or of a prompt; no weight changes here."""
