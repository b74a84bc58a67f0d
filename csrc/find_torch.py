"""Prints where torch lies, its version and its CUDA version ("none"), as a CMake list.

Run by CMake with the building interpreter. Under pip's build isolation ``import torch`` fails, yet
``sysconfig`` still names the site-packages of the environment that pip installs into.
"""

import re
import site
import sys
import sysconfig
from pathlib import Path

MISSING = """
fastvae: torch was not found in {where}.
fastvae compiles against the torch that it will run with, so torch comes first:

    {python} -m pip install torch

then run your command again. If torch is installed and this environment hides it (uv's build
isolation does), build without isolation:

    {python} -m pip install scikit-build-core pybind11 ninja
    {python} -m pip install --no-build-isolation fastvae   # or: .  in a checkout
"""


def main() -> int:
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    places += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    for place in dict.fromkeys(places):
        version_file = Path(place) / "torch" / "version.py"
        if version_file.is_file():
            text = version_file.read_text()
            version = re.search(r"^__version__ = '([^']+)'", text, re.M)
            cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.M)
            if version:
                root = version_file.parent.as_posix()
                print(f"{root};{version[1]};{cuda[1] if cuda else 'none'}")
                return 0
    where = sysconfig.get_path("purelib")
    print(MISSING.format(where=where, python=sys.executable), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
