"""The demo: real scans and money in one pool, and writers killed one after another."""
