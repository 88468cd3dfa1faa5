"""Merging: the core space, methods and their rules, `merge.merge`, what it costs (`plan`), and in parts (`shards`)."""

from .core import Basis, Core, Spectrum
from .method import Method, merge_method, method_of, methods, table

__all__ = ["Basis", "Core", "Method", "Spectrum", "merge_method", "method_of", "methods", "table"]
