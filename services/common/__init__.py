"""What at least two processes share. It has no word of their domains but the payloads'."""
