"""The whole road within other people's training loops; one file for each trainer, imported only when used.

``from renormify.callbacks.lightning import RenormCallback`` or
``from renormify.callbacks.transformers import RenormCallback``.
"""
