"""A process that moves money until it is killed: `python -m everpool.demo.teller POOL NUMBER`.

Each transfer is one transaction: two accounts of a shared array change, and an audit entry is
written. Only when the commit has returned is the transfer reported on standard output, in one
write, so that a line stands for a transfer that the pool has acknowledged.
"""

import os
import random
import sys

import everpool

ACCOUNTS = "bank/accounts"
LARGEST_TRANSFER = 100


def audit_name(teller: int, transfer: int) -> str:
    """Return the name under which a transfer's audit entry is stored."""
    return f"audit/{teller:04d}/{transfer:08d}"


def move(tx: everpool.Transaction, name: str, source: int, target: int, wanted: int) -> int:
    """Move up to `wanted` from one account to another and note it; returns how much it was."""
    accounts = tx.array(ACCOUNTS)
    amount = min(wanted, int(accounts[source]))
    accounts[source] -= amount
    accounts[target] += amount
    tx[name] = {"from": source, "to": target, "amount": amount}
    return amount


def main(path: str, teller: int) -> None:
    """Move money between random accounts, for ever."""
    choice = random.Random(teller)
    with everpool.open(path, create=False) as pool:
        count = len(pool.array(ACCOUNTS))
        transfer = 0
        while True:
            source, target = choice.sample(range(count), 2)
            wanted = choice.randint(1, LARGEST_TRANSFER)
            name = audit_name(teller, transfer)
            amount = pool.run(lambda tx, n=name, s=source, t=target, w=wanted: move(tx, n, s, t, w))
            os.write(1, f"{name} {source} {target} {amount}\n".encode())
            transfer += 1


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)  # whoever listened is gone
