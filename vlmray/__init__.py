"""Vision-language models over Ray: batch inference, fine-tuning, serving and honest comparison.

Importing the package costs nothing: every module is imported where it is used, so `vlmray --help`
does not wait for torch or Ray.
"""

__version__ = "0.1.0"
