"""Puzzles with exact answers for a language model: made, learned by many LoRAs at once, and marked in one pass.

Nothing here needs `datasets`, an evaluation harness or a network once the cache holds the base and the puzzles.
"""
