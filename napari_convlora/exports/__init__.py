"""What the user takes away: masks, objects, measurements, histories; nothing is read back."""
