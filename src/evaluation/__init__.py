"""Evaluation of a trained model: retrieval, zero-shot classification, tables, curves and a gallery of searches.

Nothing here imports the training package, so any open_clip model can be evaluated with it.
"""
