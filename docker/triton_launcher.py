"""Triton's launcher, compiled while the image is built: the image itself has no C compiler.

Triton compiles kernels itself. The one small C module with which it loads and launches them it has
`gcc` make at first use, and keeps in its cache folder; that one does not depend on the kernels, nor
on the device. So the image's builder runs

    python triton_launcher.py SITE_PACKAGES

with the interpreter and the Triton of the image. It leaves the package `semid_triton_launcher`: the
module, and a copy of this file. `TRITON_CACHE_MANAGER=semid_triton_launcher:Cache` then has Triton
look there for what is not in its cache folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.runtime.build import _build
from triton.runtime.cache import FileCacheManager

NAME = "semid_triton_launcher"


class Cache(FileCacheManager):
    """Triton's own cache, and behind it what was compiled with the image."""

    def get_file(self, filename: str) -> str | None:
        """Path of a file of this key, or None.

        The key is not asked: Triton makes it from the source and from what the command `file` says
        of the interpreter, and the image has no such command. The source is compared here.
        """
        found: str | None = super().get_file(filename)
        if found is not None:
            return found
        built = Path(__file__).parent / _digest(_source()) / filename
        return str(built) if built.exists() else None


def _source() -> str:
    """Text of the module, of the Triton that is installed."""
    return Path(triton.__file__).with_name("backends").joinpath("nvidia", "driver.c").read_text()


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def build(site_packages: Path) -> Path:
    """Compile the launcher into the package ``NAME`` there, and return its file.

    Raises
    ------
    RuntimeError, subprocess.CalledProcessError
        There is no C compiler, or it failed; or this Triton compiles more than the one module.
    """
    from triton.backends.nvidia import driver  # noqa: PLC0415 - the image, at run time, may do without

    if hasattr(driver, "make_launcher"):
        raise RuntimeError(
            f"Triton {triton.__version__} has a C compiler make a launcher for every kernel, which "
            "cannot be done beforehand: take 3.7 or newer"
        )
    source = _source()
    with tempfile.TemporaryDirectory() as folder:
        stand_in_for_libcuda(source, Path(folder))
        file = Path(folder, "cuda_utils.c")
        file.write_text(source)
        compiled = Path(
            _build(
                file.stem, str(file), folder, [folder], driver.include_dirs, driver.libraries, []
            )
        )
        package = site_packages / NAME
        target = package / _digest(source)
        target.mkdir(parents=True)
        shutil.copy(__file__, package / "__init__.py")
        return Path(shutil.copy(compiled, target))


def stand_in_for_libcuda(source: str, folder: Path) -> None:
    """Make a library to link with, since a builder has no driver: names with nothing behind."""
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", source)))
    file = folder / "libcuda.c"
    file.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
    library = folder / "libcuda.so.1"
    subprocess.run(  # noqa: S603 - files of our own
        ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", file, "-o", library],  # noqa: S607 - the builder's
        check=True,
    )


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))  # noqa: T201 - the build's log
