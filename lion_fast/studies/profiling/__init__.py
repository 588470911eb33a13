"""`lion-fast profile`: memory and time of one's own model, part by part."""

from lion_fast.studies.profiling.measure import profile_model

__all__ = ["profile_model"]
