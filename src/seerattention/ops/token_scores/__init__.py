"""Scores of the blocks for one query token, or a few: what a decode gate computes in a step."""

from .interface import MOST_TOKENS, encode_tokens, token_scores

__all__ = ["MOST_TOKENS", "encode_tokens", "token_scores"]
