"""Endpoints: pools of inference workers, and the control loop that keeps them as their rows say."""
