"""What a network keeps for its backward pass, and the gradients that come of it."""

import torch


def backward(made, checkpointing, batch):
    """Numbers saved by a forward pass of `made(checkpointing)`, and its gradients; same weights each time."""
    torch.manual_seed(0)
    network, saved = made(checkpointing).train(), 0

    def count(tensor):
        nonlocal saved
        saved += tensor.numel()
        return tensor

    torch.manual_seed(1)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = network(*batch).square().sum()
    loss.backward()
    return saved, [weight.grad for weight in network.parameters()]
