# SPDX-License-Identifier: Apache-2.0
"""Proposers: one file per method, each returns a TokenTree per request. Pure torch: no vLLM in here."""

from vllm_spec_plugins.proposers.base import Proposer, StepContext

__all__ = ["Proposer", "StepContext"]
