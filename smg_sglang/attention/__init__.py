"""Partial attention with log-sum-exp over segments of KV, and exact merging."""
