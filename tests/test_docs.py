"""The examples of the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch

import fastvae


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(fastvae.__path__, "fastvae."):
        if info.name.endswith(("__main__", "._C")):
            continue
        module = importlib.import_module(info.name)
        for test in finder.find(module, info.name):
            if test.examples:
                yield test


EXAMPLES = {test.name: test for test in examples()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    torch.manual_seed(0)
    test = EXAMPLES[name]
    test.globs = {"torch": torch, "fastvae": fastvae, "pathlib": pathlib}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_public_functions_have_examples():
    missing = [
        name
        for name in fastvae.__all__
        if callable(getattr(fastvae, name)) and ">>>" not in (getattr(fastvae, name).__doc__ or "")
    ]
    assert missing == []


def test_an_estimator_is_exported_and_documented():
    for name in fastvae.estimators.__all__:
        found = getattr(fastvae.estimators, name)
        assert found.__doc__, name
        if not isinstance(found, type):
            assert getattr(fastvae, name) is found
            assert name in fastvae.__all__
