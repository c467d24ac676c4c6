"""The processes of one job, joined by torch.distributed; `torchrun`, `accelerate launch` or Ray starts them.

Every process reads the same data and takes the same decisions; each computes a share of the rows of a step, and the
gradients are summed once a step. Rank 0 alone emits events and writes files. No-op when WORLD_SIZE is 1.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import JobError

T = TypeVar("T")
SHARDED = "ACCELERATE_USE_FSDP"  # set by `accelerate launch --use_fsdp`; set it by hand under torchrun


class ProcessGroup:
    def __init__(self, device: str) -> None:
        """Join the other processes, if any; each takes the GPU of its LOCAL_RANK. Raises JobError."""
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        self.sharded = self.size > 1 and os.environ.get(SHARDED, "").lower() in ("1", "true", "yes")
        if self.size == 1:
            return
        try:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():  # Ray has joined them already
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise JobError(detail=f"the {self.size} processes cannot be joined: {error}") from error

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, things: Sequence[T], rank: int | None = None) -> list[T]:
        """The items of a step that this process, or the one of that rank, computes."""
        return list(things[self.rank if rank is None else rank :: self.size])

    def any(self, value: bool) -> bool:
        """Whether the value is true in any process. Collective."""
        if self.size == 1:
            return value
        return bool(self._sum(torch.tensor([float(value)], device=self.device))[0])

    def led(self, value: bool) -> bool:
        """The value of rank 0. Collective."""
        return self.any(value and self.leads)

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64. Collective."""
        if self.size == 1:
            return list(numbers)
        return [float(one) for one in self._sum(torch.tensor(numbers, dtype=torch.float64, device=self.device))]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over all processes in one message; FSDP has averaged those of shards, which are scaled back."""
        if self.size == 1:
            return
        replicated = [parameter for parameter in parameters if not is_shard(parameter)]
        for parameter in replicated:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if replicated:
            flat = self._sum(torch.cat([one.grad.reshape(-1) for one in replicated if one.grad is not None]))
            for parameter, part in zip(replicated, torch.split(flat, [one.numel() for one in replicated]), strict=True):
                parameter.grad = part.view_as(parameter)
        for parameter in parameters:
            if is_shard(parameter) and parameter.grad is not None:
                parameter.grad *= self.size

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the block alone; the other processes run it afterwards and find its files."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def wait(self) -> None:
        """Barrier."""
        if self.size > 1:
            dist.barrier()

    def shard(self, model: Any) -> None:
        """FSDP2 (Zhao et al. 2023, arXiv 2304.11277) over the model's blocks; the rest stays replicated.

        Raises JobError for a model without a list of blocks.
        """
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

    def _sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor


def is_shard(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    here: Tensor = tensor.to_local() if is_shard(tensor) else tensor
    return here


def whole(tensor: Any) -> Tensor:
    """The full tensor, gathered from all processes. Collective."""
    full: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor
    return full


def parted_like(value: Tensor, like: Any) -> Tensor:
    """`value` on the device of `like`, sharded as `like` is."""
    value = value.to(like.device)
    if not is_shard(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)
