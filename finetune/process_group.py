"""The processes of one job: `torchrun`, `accelerate launch` or Ray starts them, accelerate joins them. Knows no model.

Every process reads the same data and takes the same decisions; they differ in the rows of a step that they compute.
Their gradients are added once a step, so a step is the same sum however many compute it. The first process alone
speaks and writes. Of a single process nothing here does anything, and accelerate is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from core.errors import JobError

T = TypeVar("T")
SHARDED = "ACCELERATE_USE_FSDP"  # set by `accelerate launch --use_fsdp`; the same under torchrun


class ProcessGroup:
    def __init__(self, device: str) -> None:
        """Join the others, if there are any. Raises JobError."""
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        self.sharded = self.size > 1 and os.environ.get(SHARDED, "").lower() in ("1", "true", "yes")
        if self.size == 1:
            return
        wanted = os.environ.pop(SHARDED, None)  # accelerate would take it as an order to wrap the whole model itself
        try:
            from accelerate import Accelerator

            self.accelerator: Any = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
        except (ValueError, RuntimeError, ImportError) as error:
            raise JobError(detail=f"the {self.size} processes cannot be joined: {error}") from error
        finally:
            if wanted is not None:
                os.environ[SHARDED] = wanted
        self.rank, self.device = self.accelerator.process_index, self.accelerator.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, things: Sequence[T], rank: int | None = None) -> list[T]:
        """What of a step is this process's to do, or another's."""
        return list(things[self.rank if rank is None else rank :: self.size])

    def any(self, said: bool) -> bool:
        """Whether one of them says so; all of them must ask."""
        if self.size == 1:
            return said
        return bool(self._add(torch.tensor([float(said)], device=self.device))[0])

    def led(self, said: bool) -> bool:
        """What the first of them says; all of them must ask."""
        return self.any(said and self.leads)

    def add(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all of them, in double precision where the device has it."""
        if self.size == 1:
            return list(numbers)
        return [float(one) for one in self._add(torch.tensor(numbers, dtype=torch.float64, device=self.device))]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every process's gradient that of all; in one message. Sharded ones are summed already, but averaged."""
        if self.size == 1:
            return
        whole = [parameter for parameter in parameters if not is_shard(parameter)]
        for parameter in whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if whole:
            flat = self._add(
                torch.cat([parameter.grad.reshape(-1) for parameter in whole if parameter.grad is not None])
            )
            for parameter, part in zip(whole, torch.split(flat, [one.numel() for one in whole]), strict=True):
                parameter.grad = part.view_as(parameter)
        for parameter in parameters:
            if is_shard(parameter) and parameter.grad is not None:
                parameter.grad *= self.size

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process alone, then the others, who find what it has made."""
        if self.size == 1:
            yield
            return
        with self.accelerator.main_process_first():
            yield

    def wait(self) -> None:
        if self.size > 1:
            self.accelerator.wait_for_everyone()

    def shard(self, model: Any) -> None:
        """FSDP2: each process keeps a part of every block, and has it whole only while it is computed (Zhao et al.
        2023, arXiv 2304.11277). What is outside the blocks is kept whole. Raises JobError."""
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise JobError(detail=f"{type(model).__name__} has no list of blocks to shard")
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in max(lists, key=len):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)

    def _add(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed


def is_shard(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """What of it is here."""
    here: Tensor = tensor.to_local() if is_shard(tensor) else tensor
    return here


def whole(tensor: Any) -> Tensor:
    """All of it; every process must ask."""
    everything: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor
    return everything


def parted_like(value: Tensor, like: Any) -> Tensor:
    """`value`, on the device of `like` and in parts as `like` is."""
    value = value.to(like.device)
    if not is_shard(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)
