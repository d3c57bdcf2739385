"""The agent: the one process of a host that plays a log into the host's replica of it.

- `frames`: the bytes of its protocol
- `host`: the replica and its log
- `blocks`, `values`: memory and large values, as far as they were fetched
- `commits`: what the host's processes commit, packed into entries
- `outcomes`: what became of commits whose answers were lost
- `server`, `connection`: who asks for what
- `starting`: finding an agent, and starting one
- `client`: a process's way to whichever agent there is
- `checking`: comparing everything with its checksums
"""
