"""The sweep over every BatchNorm model of torchvision and timm, and the judge it is held by.

``make zoo`` runs it; ``PYTHONPATH=tests python -m zoo --help`` tells how to run a part of it. The judge
shares no code with what it judges: it finds the norm layers by a walk of its own, and computes in float64
how the paper would have moved their statistics.
"""
