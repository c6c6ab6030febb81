"""Empty stand-ins for packages that SGLang imports on any machine and a text model on a CPU never calls.

Only in SGLang's CPU environment: `make setup-sglang` copies this file into it, and its Python reads it at every start.
A package that is really there comes first. A kernel of a stand-in that is called all the same says so in its error.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
import types

KERNELS = {"sgl_kernel"}  # every function of theirs is for a GPU
PACKAGES = KERNELS | {"triton", "torchvision", "torchaudio", "numba", "soundfile"}


class _Any(type):
    def __getattr__(cls, name):
        if name.startswith("__") or name == "active":  # triton's `driver.active`: there is no driver
            raise AttributeError(name)
        return cls

    def __call__(cls, *args, **options):
        """A decorator gives back what it decorates."""
        return args[0] if len(args) == 1 and callable(args[0]) and not options else cls

    def __iter__(cls):  # torch looks for a CPU among triton's backends
        return iter(())


class Anything(metaclass=_Any):
    """Whatever is asked of it: a module's function, a class, a constant."""


def refuse(package):
    raise RuntimeError(f"a GPU kernel of {package} was called, and this is SGLang's CPU environment")


class _Kernel(_Any):
    def __call__(cls, *args, **options):
        refuse("sgl_kernel")


class Kernel(metaclass=_Kernel):
    """The same of a package whose functions are kernels."""


class Jitted:
    """What @triton.jit makes of a function: kernel[grid](...) starts it, and a call without a grid is for kernels."""

    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __getitem__(self, grid):
        refuse(f"triton ({self.__name__})")

    def __call__(self, *args, **options):
        refuse(f"triton ({self.__name__})")


def jit(function=None, **options):
    return Jitted(function) if function else jit


class StandIn(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if (self.__name__, name) == ("triton", "jit"):
            return jit
        return Kernel if self.__name__.partition(".")[0] in KERNELS else Anything


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())
