"""How ranks meet, also when torchrun starts them again."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
import uuid
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError

_PAUSE = 0.05  # seconds from one look into the store to the next


def join(device: torch.device, limit: datetime.timedelta) -> tuple[Any, Any]:
    """Enters the default process group that torchrun's environment describes; the store in which its ranks met, and a
    group on CPUs beside it.

    Raises UserError where the others cannot be reached.
    """
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        backend = "nccl" if device.type == "cuda" else "gloo"
        prefix = agree_on_prefix(
            store, rank, world_size, limit.total_seconds(), f"{device.type} {socket.gethostname()}"
        )
        fresh = dist.PrefixStore(prefix, store)
        dist.init_process_group(
            backend, store=dist.PrefixStore("default", fresh), rank=rank, world_size=world_size, timeout=limit
        )
        return fresh, dist.new_group(backend="gloo", timeout=limit)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"no rendezvous with the other ranks at {address} ({reason}); see that the host is reachable, that all "
            "nodes were started with the same address, and that GLOO_SOCKET_IFNAME names the network between them "
            "where a host's own name does not lead to it"
        ) from None


def agree_on_prefix(store: Any, rank: int, world_size: int, limit: float, place: str = "") -> str:
    """A prefix for keys that no earlier start of these ranks has used, the same on all of them.

    torchrun keeps its store when it starts ranks again, with the addresses that dead ones have left in it, and its
    restart count is a node's own. So each rank leaves a name that it has just made up, the main one answers with a
    prefix of its own and all names it has found, and a rank takes the first answer that has its name. Raises ValueError
    where some do not come within `limit` seconds; UserError on the main rank where one's place, the type of its device
    and its host, has another type than its own.
    """
    own, prefix = f"{uuid.uuid4().hex} {place}", uuid.uuid4().hex
    deadline = time.monotonic() + limit
    keys = [f"genkd/name{number}" for number in range(world_size)]
    store.set(keys[rank], own)
    names: dict[int, str] = {}
    while time.monotonic() < deadline:
        if rank == 0:
            found = {number: store.get(key).decode() for number, key in enumerate(keys) if store.check([key])}
            if found != names:
                names = found
                store.set("genkd/answer", json.dumps([prefix, names]))
            if len(names) == world_size:
                _refuse_other_devices(names)
            if len(names) == world_size and store.add(f"{prefix}/met", 0) == world_size - 1:
                return prefix
        elif store.check(["genkd/answer"]):
            answer, known = json.loads(store.get("genkd/answer"))
            if known.get(str(rank)) == own:
                store.add(f"{answer}/met", 1)
                return answer
        time.sleep(_PAUSE)
    missing = [number for number in range(world_size) if number not in names]
    who = (
        f"rank {', '.join(map(str, missing[:8]))} has not come" if rank == 0 and missing else "not all ranks have come"
    )
    raise ValueError(f"{who} within {limit:.0f} s")


def _refuse_other_devices(names: dict[int, str]) -> None:
    kinds = {rank: name.split()[1:] for rank, name in names.items()}
    for rank, kind in kinds.items():
        if kind[:1] != kinds[0][:1]:
            (device, host), (other, main) = kind, kinds[0]
            raise UserError(
                f"rank {rank} on {host} would train on {device}, rank 0 on {main} on {other}; see with `genkd doctor` "
                "why one finds no GPU, or set device=cpu"
            )
