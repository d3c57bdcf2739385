"""The past of a pool at a path, in a folder beside it.

    POOL/past/everpool.json         that there is a past, and since which version; see `agent.pools`
    POOL/past/checkpoints/...       manifests, oldest version first in the order of their names
    POOL/past/index/..., pages/...  what they are made of; see `segments.format`
    POOL/past/log/chunks/...        entries, at the positions they have in the pool's own log
    POOL/past/values/...            large values that the pool itself needs no more, by links

It begins with the first snapshot, checkpoint or branch; until then a pool pays nothing for it. From
then on

- a large value that is replaced stays in `POOL/values` until the entry that replaced it leaves
  the tail, and is linked to `past/values` before
- the floor is not raised above the newest checkpoint, so the tail has all that came after it
- the entries up to a checkpoint are archived before the record that names it is committed

so any version since the first checkpoint can be made from the newest checkpoint that is not behind
it, the archive, and the tail.

Nothing in the pool refers to files in here: the folder may be deleted, which ends the past.

- `folder`: where things are
- `entries`: archiving entries, and reading them back, from the archive and then the tail
- `keeper`: making checkpoints
- `looking`: a pool as it was
- `sending`: branches and backups, at a URL
"""
