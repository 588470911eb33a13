"""`lion-fast profile`: memory and time of one's own model, part by part."""

__all__ = ["profile_model"]


def __getattr__(name: str):
    if name != "profile_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # the command line reads this package's options without loading timm
    from lion_fast.studies.profiling.measure import profile_model

    return profile_model
