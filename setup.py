"""Gives a wheel its platform's tag when the compiled CPU kernels are in it; all else is in pyproject.toml.

`v4graph kernels build-cpu && pip wheel --no-deps .` makes `v4graph-*-py3-none-linux_x86_64.whl`; without the
library the wheel stays `py3-none-any` and graphs run through their function bodies.
"""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

LIBRARY = Path(__file__).parent / "runtime" / "v4graph_runtime" / "native" / "lib" / "libv4graph_cpu.so"


class NativeDistribution(Distribution):
    """A distribution that is of one platform where the library is there."""

    def has_ext_modules(self) -> bool:
        return LIBRARY.is_file()


class NativeWheel(bdist_wheel):
    """A wheel for any Python 3: the library knows onnxruntime's C API, and no Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(distclass=NativeDistribution, cmdclass={"bdist_wheel": NativeWheel})
