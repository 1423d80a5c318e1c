"""The channels of the database's notifications (services/common/notifications.py).

`training_moved`: a training's id, something of it has changed. `trainings_due`: a training's id, there is something to
be done for it that nobody waits for.
"""

from __future__ import annotations

TRAINING_MOVED = "training_moved"
TRAININGS_DUE = "trainings_due"
CHANNELS = [TRAINING_MOVED, TRAININGS_DUE]
