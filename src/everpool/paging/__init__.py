"""Memory that is larger than what was fetched of it: blocks come when they are asked for."""
