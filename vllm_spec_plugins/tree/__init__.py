# SPDX-License-Identifier: Apache-2.0
"""Token trees and the rules that accept from them. Pure torch: knows neither vLLM nor models."""

from vllm_spec_plugins.tree.accept import Acceptance, AcceptRule, TargetRows, Walk, accept_down_to
from vllm_spec_plugins.tree.tree import TokenTree

__all__ = ["AcceptRule", "Acceptance", "TargetRows", "TokenTree", "Walk", "accept_down_to"]
