"""The findings of the Batch Renormalization paper, repeated on Fashion-MNIST with renormify's own layers."""
