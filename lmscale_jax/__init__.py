"""A laboratory for language-model scaling experiments in JAX."""

__version__ = "0.1.0"
