"""The recipe that trains the embedded long-context language model. Run ``python -m testbed --help``."""
