"""What an engine is tested with, and what a program that uses Everpool can test itself with.

- `everpool.testing.reference`: a naive pool in memory, the specification in code.
- `everpool.testing.conformance`: the guarantees as a pytest class that every engine subclasses.
- `everpool.testing.conformance.log`, `.store`: the same for a log, and for an object store.
- `everpool.testing.stateful`: a hypothesis state machine that compares an engine with the
  reference.
- `everpool.testing.history`: records what several processes did, and checks that some serial
  order explains it.

`conformance` needs pytest and `stateful` needs hypothesis: import the module you want.
"""
