"""Memory that a network saves for its backward pass, and its gradients."""

import torch


def backward(made, checkpointing, batch):
    """Elements that a forward pass of `made(checkpointing)` saves, and its gradients; weights are fixed."""
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
