"""Freed memory kept for reuse: said where it is not, and never against the user's own choice."""

import ctypes

import pytest
import torch

import batchnorm as bn
from batchnorm.kernels import heap, keep_freed_memory


@pytest.fixture(autouse=True)
def _anew():
    heap.keep_freed_memory.cache_clear()
    yield
    heap.keep_freed_memory.cache_clear()


def test_on_this_system_it_is_kept():
    assert keep_freed_memory() == ""


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"])
def test_the_users_own_choice_stands(name, monkeypatch):
    monkeypatch.setenv(name, "65536")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("changed all the same"))
    assert name in keep_freed_memory()


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert "another allocator" in keep_freed_memory()


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert keep_freed_memory() == "the C library is not glibc"


def test_accelerate_tells_what_became_of_it(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    _, report = bn.accelerate(net, torch.randn(8, 4))
    assert report.keeps_memory
    assert "kept for new ones" in str(report)
    _, report = bn.accelerate(net, torch.randn(8, 4), keep_memory=False)
    assert not report.keeps_memory
    assert "memory of freed" not in str(report)
    heap.keep_freed_memory.cache_clear()
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    _, report = bn.accelerate(net, torch.randn(8, 4))
    assert not report.keeps_memory
    assert "MALLOC_TOP_PAD_" in str(report)
