"""``python -m bench``: see ``bench/README.md``."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the working directory first on the path. In the repository that would import the
# source folder fastvae/, which has no compiled module, and time the slow reference path under the
# name of fastvae. So the repository goes last: an installed fastvae wins, `bench` is still found.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path += [str(ROOT / "tests"), str(ROOT)]  # tests: for cases.py, the table

# The memory profiler announces each of its starts on stderr. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Inductor compiles here, one kernel at a time: its pool of workers would wake during the timing.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

if __name__ == "__main__":
    from bench.run import main

    sys.exit(main())
