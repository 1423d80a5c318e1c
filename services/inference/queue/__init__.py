"""Jobs that wait and workers that take them: places, leases, results that count once, and the pools of endpoints."""
