"""Memory that a network saves for its backward pass, and its gradients."""

import torch


def backward(build, checkpointing, batch):
    """Elements saved by a forward pass of `build(checkpointing)`, and its gradients, with fixed weights."""
    torch.manual_seed(0)
    network, saved = build(checkpointing).train(), 0

    def count(tensor):
        nonlocal saved
        saved += tensor.numel()
        return tensor

    torch.manual_seed(1)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = network(*batch).square().sum()
    loss.backward()
    return saved, [weight.grad for weight in network.parameters()]
