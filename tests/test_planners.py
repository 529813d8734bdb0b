"""Planner "cost": its guarantees, its limits, and how near it comes to the best plan there is."""
