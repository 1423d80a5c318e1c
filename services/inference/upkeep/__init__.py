"""What time brings, and nobody waits for: deadlines, retention, objects to remove, raw answers to write."""
