"""Segments: what checkpoints are made of, in an object store.

- `format`: the bytes of manifests, runs and pages
- `checkpoints`: writing them, and reading them back
"""
