"""Muon (Jordan and others, 2024) as torch.optim.Muon does it, with all matrices of one shape in one batch.

One by one, a small model's sixty matrices are some 1,500 launches a step, more than its forward and backward pass.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.775, 2.0315)
NUM_ITERATIONS, EPS = 5, 1e-7


class BatchedMuon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, at a rate that makes an update as large as AdamW's; decoupled decay."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def _update(self, matrices: list[nn.Parameter], rate: float, weight_decay: float, momentum: float) -> None:
        gradients = torch.stack([matrix.grad for matrix in matrices])
        state = self.state[matrices[0]]
        mean = state.setdefault("momentum", torch.zeros_like(gradients))
        mean.lerp_(gradients, 1 - momentum)
        updates = orthogonalised(gradients.lerp_(mean, momentum)).to(gradients.dtype)
        torch._foreach_mul_(matrices, 1 - rate * weight_decay)
        torch._foreach_add_(matrices, list(updates.unbind(0)), alpha=-0.2 * rate * max(matrices[0].shape) ** 0.5)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Nearly the nearest semi-orthogonal matrix to each of [B, M, N], by Newton and Schulz's iteration.

    In bfloat16, on a CPU, where that is slow, in float32.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
