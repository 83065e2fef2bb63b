"""Training in several processes, one a GPU, started by torchrun. A process alone is a group of one: nothing is sent."""

import os

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

rank = int(os.environ.get("RANK", 0))
num_processes = int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> torch.device:
    """Join the group; returns this process's own device."""
    if num_processes == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    if num_processes > 1:
        dist.destroy_process_group()


def wait_for_all() -> None:
    shared(0.0)


def shared(value: float) -> float:
    """The first process's `value`, in all of them. Goes by the CPU: the GPU's queue is not waited for."""
    if num_processes == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(box, 0)
    return box.item()


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Every gradient becomes its mean over the processes: one message for all of them."""
    if num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat /= num_processes
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))
