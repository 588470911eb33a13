"""Which module is at work, for those who count memory or time by module.

A module that is called says so by torch's hooks, wherever its source lies. A helper that runs a piece of a
module without calling it (the attention of a frozen block, say) is decorated with `works_for_first`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_Call = TypeVar("_Call", bound=Callable)

# Those who want to know at this moment; empty but while something is counted
WATCHERS: list["AtWork"] = []


def works_for_first(helper: _Call) -> _Call:
    """Decorate a function that does the work of its first argument, a module, without calling it."""

    @functools.wraps(helper)
    def told(module: nn.Module, *args, **kwargs):
        if not WATCHERS:
            return helper(module, *args, **kwargs)
        with ExitStack() as stack:
            for watcher in WATCHERS:
                stack.enter_context(watcher.at(module))
            return helper(module, *args, **kwargs)

    return told


class AtWork:
    """Context manager that knows by `name` whose module is at work: the innermost one that has a name.

    names: of modules, by id; a module without a name works for who called it. outside: the name where no
    module is at work. Hooks are torch's global ones: a hook on a module of its own would send a frozen block
    another way (see `frozen.plain_attention`).

    >>> end, head = nn.Identity(), nn.Identity()
    >>> with AtWork({id(end): "end", id(head): "head"}, outside="loss") as work:
    ...     _ = end.register_forward_hook(lambda *_: print(work.name))
    ...     with work.at(head):
    ...         print(work.name)
    ...     print(work.name)
    head
    loss
    """

    def __init__(self, names: Mapping[int, str], outside: str):
        self._names = names
        self._stack: list[tuple[nn.Module | None, str]] = [(None, outside)]

    @property
    def name(self) -> str:
        """Of who is at work now."""
        return self._stack[-1][1]

    def changed(self) -> None:
        """Called where `name` has become another; for subclasses."""

    def __enter__(self):
        self._hooks = [
            register_module_forward_pre_hook(lambda module, args: self._begin(module)),
            # also where the forward raises
            register_module_forward_hook(lambda module, args, out: self._end(module), always_call=True),
        ]
        WATCHERS.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        WATCHERS.remove(self)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def at(self, module: nn.Module) -> Iterator[None]:
        """Work for a module that is not called."""
        self._begin(module)
        try:
            yield
        finally:
            self._end(module)

    def _begin(self, module: nn.Module) -> None:
        before = self.name
        self._stack.append((module, self._names.get(id(module), before)))
        if self.name != before:
            self.changed()

    def _end(self, module: nn.Module) -> None:
        before = self.name
        places = [i for i, (other, _) in enumerate(self._stack) if other is module]
        if places:  # what an error left above it goes too
            del self._stack[places[-1] :]
        if self.name != before:
            self.changed()
