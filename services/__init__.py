"""The five services, each a process of its own, and what they share."""
