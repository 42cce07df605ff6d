"""One process or many: what torchrun started, and sums over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all of a run."""

    rank: int
    size: int
    local_rank: int

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0


ALONE = World(0, 1, 0)


def world_of_process() -> World:
    """This process as torchrun started it, or as the only one."""
    rank, size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return World(rank, size, local_rank)


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the other processes that torchrun started, or be the only one; may be nested."""
    world = world_of_process()
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()


class ElsewhereError(ValueError):
    """What another process has found and said."""


def on_main(world: World, action: Callable[[], None]) -> None:
    """Run ``action`` on the main process; what it finds stops all of them.

    Raises:
        Exception: on the main process, what ``action`` raised; ElsewhereError on the others.
    """
    problem: Exception | None = None
    if world.main:
        try:
            action()
        except Exception as error:
            problem = error
    stopped = [problem is not None]
    if world.size > 1:
        dist.broadcast_object_list(stopped, src=0)
    if stopped[0]:
        raise problem or ElsewhereError("the main process says why")


def pick_device(name: str, world: World = ALONE) -> torch.device:
    """The device that ``--device`` means for this process.

    Raises:
        ValueError: if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, but torch sees no CUDA device")
    index = world.local_rank if name == "cuda" else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device: no cuda:{index} among {torch.cuda.device_count()} devices")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
