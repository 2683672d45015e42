"""How a daemon says how it is, and what it can be told: notify, status, control, metrics."""
