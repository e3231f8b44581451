"""Files written whole or not at all, and read with limits; nothing here knows what an image is."""
