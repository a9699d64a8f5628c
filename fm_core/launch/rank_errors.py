"""Classification of a rank's exception: whether a restart can help and, if not, which key to change.

A solver failure, or a batch that does not fit into memory, recurs after every restart.
"""

from fm_core.errors import Outcome, SolverError, outcome_of

MEMORY_KEYS = {
    "train": "a smaller train.micro_batch, or train.gradient_checkpointing: true",
    "sample": "a smaller sample.batch",
    "evaluate": "a smaller evaluate.likelihood.batch or sample.batch",
}
SOLVER_KEYS = {
    "train": "larger rtol and atol of method.objective",
    "sample": "larger sample.rtol and sample.atol, or more sample.steps",
    "evaluate": "larger rtol and atol of evaluate.likelihood or of sample",
}
OUT_OF_MEMORY = (
    *("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
    *("CUDA out of memory", "HIP out of memory", "std::bad_alloc", "CUDNN_STATUS_ALLOC_FAILED"),
)
"""Messages of torch's errors that have no class of their own."""


def outcome_and_message(error: BaseException, stage: str) -> tuple[Outcome, str]:
    """Outcome of a rank that raised this error, and one line for its exit record."""
    if out_of_memory(error):
        keys = MEMORY_KEYS.get(stage)
        return Outcome.UNRECOVERABLE, f"out of memory: {_line(error)}" + (f"; set {keys}" if keys else "")
    # torchdiffeq's adjoint method asserts it in the backward pass.
    underflow = isinstance(error, AssertionError) and "underflow in dt" in str(error)
    if isinstance(error, SolverError) or underflow:
        keys = SOLVER_KEYS.get(stage)
        return Outcome.UNRECOVERABLE, f"{_line(error)}" + (f"; set {keys}" if keys else "")
    outcome = outcome_of(error)
    if outcome is Outcome.FAILED:
        return outcome, f"{type(error).__name__}: {error}".splitlines()[0]
    return outcome, str(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a device."""
    # By name, because this module must not import torch.
    if isinstance(error, MemoryError) or any(
        kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
    ):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
