"""Former import path of `TimestepSampler`, kept because user-defined time distributions subclass `Times`."""

from fm_core.method.timestep_samplers import TimestepSampler as Times

__all__ = ["Times"]
