"""The published run: what is compared, how scales are chosen, every text's outcome, and what follows from it.

`rows` says what is compared, `trials` of which adapters; `run` merges and evaluates and appends to a file of
`outcomes`; `choice` chooses scales on validation texts, again in every resample; `tables` is functions of that file.
"""
