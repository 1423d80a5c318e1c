"""A1111's samplers: their schedules, their steps, and the noise that a picture begins with."""
