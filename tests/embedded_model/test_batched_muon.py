"""All matrices of a shape at once are updated as torch.optim.Muon updates one after the other."""

import copy

import torch
from torch import nn

from benchmarks.embedded_model.batched_muon import BatchedMuon


def test_it_is_muon():
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    unused = nn.Parameter(torch.ones(8, 8))
    batched = BatchedMuon([*ours, unused], lr=0.02, weight_decay=0.05)
    single = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        batched.step()
        single.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    assert unused.eq(1).all()
