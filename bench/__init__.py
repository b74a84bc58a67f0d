"""The benchmark: all of ``tests/cases.py`` against eager PyTorch, torch.compile and the limit.

``python -m bench --help`` tells how to run it, ``bench/README.md`` how to read it.
"""
