"""Turn raw videos and captions into training-ready latents."""

__version__ = "0.1.0"
