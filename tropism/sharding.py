"""The frozen network split over the processes (FSDP2): each holds its share of the weights and borrows the rest, a
block at a time, for as long as it computes with it.

What is trained stays whole everywhere, so that gradients, optimizer, checkpoints and adapters are as without. A block
is gathered by all processes together, so all must call the network equally often: ``plan.check_launch`` sees to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tropism.processes import Processes


def shard(network: nn.Module, trained: list[nn.Parameter], processes: Processes) -> None:
    """Splits all weights of ``network`` but those that are ``trained``, block by block.

    Raises ValueError when nothing is left to split, as in full training.
    """
    whole = set(trained)
    if not any(parameter not in whole for parameter in network.parameters()):
        raise ValueError("shard splits frozen weights, and all of them are trained; train a LoRA instead")
    mesh = init_device_mesh(torch.device(processes.device).type, (processes.count,))
    for part in (*blocks(network), network):
        # Given back after every pass, also by the outermost: the first process alone reads the adapter to save it,
        # which gives back what was borrowed, and then the processes would disagree on what must be gathered.
        fully_shard(part, mesh=mesh, ignored_params=whole, reshard_after_forward=True)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of the lists of layers: what is called one after another."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)
