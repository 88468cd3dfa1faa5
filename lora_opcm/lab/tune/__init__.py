"""Choosing how to merge by a few texts of every task: which texts, what a model loses on them, and the choice.

A method and a length are chosen by validation loss, in forward passes alone: the merged update stands beside the
weights of a model that is loaded once.
"""
